"""The training sequences that look most alike to a model: nearest neighbours of its hidden states."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from headwater.core.errors import MethodError
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.data.corpus import Corpus, TokenCorpus

if TYPE_CHECKING:
    from headwater.core.model import Model

_SAMPLE = 1024  # sequences from which the mean is taken


@dataclass(frozen=True, kw_only=True)
class NearestConfig:
    """How to look for neighbours.

    k: how many. site: whose mean over all positions stands for a sequence (a stream: "embed", "resid_post.3"); None:
    the stream after the middle layer. center: take the corpus's mean (over up to 1,024 sequences, evenly) away first:
    hidden states share a large common part, and without that everything looks alike. sequences: only the first so many.
    """

    k: int = 10
    site: str | None = None
    center: bool = True
    sequences: int | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        if min(self.k, self.batch, self.sequences or 1) < 1:
            raise MethodError("the settings of nearest do not fit", got=self, wanted="numbers above 0")


@register_result
class NearestSequences(Result):
    """Nearest training sequences of each query.

    `tables["nearest"]`: query, rank (from 0), sequence, cosine, text. `tables["queries"]`: query, name, mean, sd (of
    the cosine with all sequences: what is no neighbour at all), n. Facts: site, sequences, corpus.
    """

    kind: ClassVar[str] = "nearest_sequences"
    main: ClassVar[str | None] = "nearest"


def nearest(
    model: "Model", queries: Any, corpus: Any, *, config: NearestConfig | None = None, **options: Any
) -> NearestSequences:
    """For each query the sequences with the most similar hidden states: exact cosines with every sequence, in one pass.

    queries: texts, or rows of token ids; or one. corpus: a `Corpus` of token ids, or what `Corpus.open` takes. Options
    are those of `NearestConfig`. Known failure: alike is not responsible: a neighbour may have taught the model
    nothing, and what taught it may look otherwise. The mean over positions forgets the order of words.
    """
    started = time.monotonic()
    config = configured(NearestConfig, config, options)
    found = Corpus.open(corpus)
    if not isinstance(found, TokenCorpus):
        raise MethodError(f"{found.name} holds texts", wanted="sequences of token ids")
    site = config.site or f"resid_post.{model.n_layers // 2}"
    n = min(found.n_sequences, config.sequences or found.n_sequences)
    if config.k > n:
        raise MethodError("fewer sequences than are asked for", got=n, wanted=f"k = {config.k} or more")
    asked = _asked(queries)
    middle = np.zeros(model.d_model)
    if config.center:
        some = np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(np.int64))
        middle = np.concatenate(list(_means(model, found, some, site, config.batch))).mean(axis=0)
    mine = _unit(np.concatenate([_mean(model, one, site) for one in asked]) - middle)
    best = np.full((len(mine), config.k), -np.inf)
    which = np.full((len(mine), config.k), -1, dtype=np.int64)
    total, squares, at = np.zeros(len(mine)), np.zeros(len(mine)), 0
    for rows in _means(model, found, np.arange(n), site, config.batch, label=f"nearest: {found.name}"):
        cosines = mine @ _unit(rows - middle).T
        total, squares = total + cosines.sum(axis=1), squares + (cosines**2).sum(axis=1)
        both = np.concatenate([best, cosines], axis=1)
        names = np.concatenate([which, np.tile(np.arange(at, at + len(rows)), (len(mine), 1))], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, : config.k]
        best, which = np.take_along_axis(both, order, axis=1), np.take_along_axis(names, order, axis=1)
        at += len(rows)
    tokenizer = found.tokenizer if found.tokenizer is not None else model.tokenizer
    told = [
        {"query": query, "rank": rank, "sequence": int(which[query, rank]), "cosine": float(best[query, rank]),
         "text": _text(tokenizer, found.tokens(int(which[query, rank])))}
        for query in range(len(mine))
        for rank in range(config.k)
    ]  # fmt: skip
    sd = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))
    about = [
        {"query": i, "name": one if isinstance(one, str) else _text(tokenizer, np.asarray(one)),
         "mean": float(total[i] / n), "sd": float(sd[i]), "n": n}
        for i, one in enumerate(asked)
    ]  # fmt: skip
    return NearestSequences(
        tables={"nearest": pl.DataFrame(told), "queries": pl.DataFrame(about)},
        facts={"site": site, "sequences": n, "corpus": found.name},
        config=asdict(config),
        provenance=Provenance.collect(model, seconds=time.monotonic() - started),
    )


def _asked(queries: Any) -> list[Any]:
    """Each a text, or token ids."""
    given = queries.cpu().numpy() if isinstance(queries, torch.Tensor) else queries
    rows: list[Any] = [given] if isinstance(given, str) else list(given)
    if rows and not any(isinstance(one, str) or np.ndim(one) for one in rows):
        rows = [rows]
    if not rows:
        raise MethodError("nothing is asked for", wanted="at least one query")
    if any(len(one) == 0 for one in rows):
        raise MethodError(
            "a query has no tokens", got=f"number {next(i for i, one in enumerate(rows) if not len(one))}"
        )
    return rows


def _means(
    model: "Model", corpus: TokenCorpus, numbers: NDArray[np.int64], site: str, batch: int, *, label: str | None = None
) -> Iterator[NDArray[np.float64]]:
    starts: Any = range(0, len(numbers), batch)
    for start in track(starts, label) if label else starts:
        yield _mean(model, corpus.rows(numbers[start : start + batch]), site)


def _mean(model: "Model", inputs: Any, site: str) -> NDArray[np.float64]:
    """[n, D]: the site's mean over positions."""
    if not isinstance(inputs, str):
        inputs = torch.as_tensor(np.asarray(inputs, dtype=np.int64))
    found = model.run(inputs, capture=(site,), logits="none")[site]
    if not isinstance(found, torch.Tensor) or found.ndim != 3 or found.shape[-1] != model.d_model:
        raise MethodError("a sequence is told by a stream", got=site, wanted="such as embed or resid_post.3")
    return found.double().mean(dim=1).cpu().numpy()


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _text(tokenizer: Any, ids: NDArray[Any]) -> str:
    return (tokenizer.decode(ids.tolist()) if tokenizer is not None else " ".join(map(str, ids.tolist())))[:400]
