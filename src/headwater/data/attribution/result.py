"""Which training sequences a behavior is put down to, always beside what chance and a plain search would say."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.claims import bootstrap
from headwater.core.errors import MethodError
from headwater.core.results import Result, register_result

BASE, RETRIEVAL = "base rate", "retrieval"
SUMMARY: dict[str, Any] = {
    "ranking": pl.String, "of": pl.String, "k": pl.Int64, "precision": pl.Float64, "lo": pl.Float64,
    "hi": pl.Float64, "n": pl.Int64,
}  # fmt: skip
TOP: dict[str, Any] = {
    "query": pl.Int64, "ranking": pl.String, "rank": pl.Int64, "sequence": pl.Int64, "score": pl.Float64,
    "together": pl.Boolean, "relevant": pl.Boolean, "text": pl.String,
}  # fmt: skip
QUERIES: dict[str, Any] = {
    "query": pl.Int64, "name": pl.String, "subject": pl.String, "object": pl.String, "loss": pl.Float64,
    "together": pl.Int64, "relevant": pl.Int64,
}  # fmt: skip


@register_result
class AttributionToData(Result):
    """Scores of training sequences for queries.

    `tables["summary"]`: ranking (the method, "retrieval": co-occurrence retrieval, "base rate": any sequence), of (what
    the first k are held against: "relevant", where it is known; "together": they mention subject and object; else
    "retrieval": the first k of the retrieval), k, precision (mean over queries), lo, hi (over queries), n (queries).
    `tables["top"]`: query, ranking, rank (from 0), sequence (its number in the corpus), score, together, relevant,
    text.
    `tables["queries"]`: query, name, subject, object, loss (nats, last checkpoint), together and relevant (how many
    sequences). Tensors: scores, retrieval [queries, sequences], sequences [sequences]. Facts: method, steps,
    sequences.

    It is not saved without both baselines.
    """

    kind: ClassVar[str] = "data_attribution"
    main: ClassVar[str | None] = "summary"

    @property
    def text(self) -> str:
        """What was found, in a sentence each, with both baselines."""
        self._check()
        lines: list[str] = []
        for (of, k), rows in self.tables["summary"].group_by("of", "k", maintain_order=True):
            said = [f"{row['ranking']} {_number(row)}" for row in rows.iter_rows(named=True)]
            lines.append(f"of the first {k}, {_OF.get(str(of), of)}: {', '.join(said)}")
        return "; ".join(lines)

    def first(self, k: int, ranking: str | None = None) -> list[int]:
        """The numbers of the sequences that are among the first k of any query, rising.

        ranking: the method (if not said), "retrieval", or "random": as many, drawn by the number 0.
        """
        scores = self.ranked(ranking or self.facts["method"])
        if not 1 <= k <= scores.shape[1]:
            raise MethodError("no so many sequences were scored", got=k, wanted=f"1 to {scores.shape[1]}")
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return sorted(self.tensors["sequences"].numpy()[np.unique(best)].tolist())

    def ranked(self, ranking: str) -> NDArray[Any]:
        """[queries, sequences] the scores of the method, or of the retrieval."""
        names = {self.facts["method"]: "scores", RETRIEVAL: "retrieval"}
        if ranking not in names:
            raise MethodError("no such ranking", got=repr(ranking), wanted=" or ".join(names))
        return self.tensors[names[ranking]].numpy()

    def save(self, folder: str | Path) -> Path:
        self._check()
        return super().save(folder)

    def _check(self) -> None:
        held = set(self.tables["summary"]["ranking"].to_list()) if "summary" in self.tables else set()
        if missing := {BASE, RETRIEVAL} - held:
            raise MethodError(
                "attribution to data is not told without its baselines", got=sorted(missing), wanted="in the summary"
            )


_OF = {
    "relevant": "share that truly made it",
    "together": "share that mention both",
    RETRIEVAL: "share among the first of the retrieval",
}


def _number(row: dict[str, Any]) -> str:
    return f"{row['precision']:.3g} ({row['lo']:.3g} to {row['hi']:.3g})"


def first_k(scores: NDArray[Any], k: int) -> NDArray[np.int64]:
    """[queries, k] the places of the highest scores, the highest first; of equal ones the earlier."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def summary(
    rankings: dict[str, NDArray[Any]], k: int, together: NDArray[np.bool_] | None, relevant: NDArray[np.bool_] | None
) -> pl.DataFrame:
    """The table: each ranking's precision at k and the base rate, against what is known of the sequences."""
    held: dict[str, NDArray[np.bool_]] = {}
    if relevant is not None:
        held["relevant"] = relevant
    if together is not None:
        held["together"] = together
    first = {name: first_k(scores, k) for name, scores in rankings.items()}
    if not held:
        among = np.zeros(next(iter(rankings.values())).shape, dtype=bool)
        np.put_along_axis(among, first[RETRIEVAL], True, axis=1)
        held[RETRIEVAL] = among
    rows: list[list[Any]] = []
    for of, true in held.items():
        values = {name: np.take_along_axis(true, best, axis=1).mean(axis=1) for name, best in first.items()}
        values[BASE] = true.mean(axis=1)
        for name, each in values.items():
            found = bootstrap(each, method="percentile") if len(each) > 1 else None
            lo, hi = (found.lo, found.hi) if found is not None else (float("nan"), float("nan"))
            rows.append([name, of, k, float(each.mean()), lo, hi, len(each)])
    return pl.DataFrame(rows, schema=SUMMARY, orient="row")
