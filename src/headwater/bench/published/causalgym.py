"""CausalGym (Arora, Jurafsky & Potts, 2024): how far a one-dimensional change moves a linguistic choice.

Reads the published pairs (base and src as lists of spans, base_label, src_label, base_type, src_type, task), the
published templates (`syntaxgym.json`), and agreement pairs of Marks et al. (2024) (clean_prefix, patch_prefix,
clean_answer, patch_answer, case).
"""

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from headwater.bench.published.files import missing, read_list
from headwater.bench.published.interchange import Interchange, base_vectors, first_token, fit_subspace, swapped
from headwater.bench.published.result import SCHEMA, PublishedScores, score_row
from headwater.core.errors import BehaviorError, did_you_mean
from headwater.core.files import read_json
from headwater.core.model import Model
from headwater.core.results import Provenance

_END_OF_TEXT = "<|endoftext|>"
_SPANS = re.compile(r"(?<=\})|(?= \{)|(?<! )(?=\{)")  # a variable with the space before it is a span of its own


@dataclass(frozen=True, kw_only=True)
class MinimalPair:
    """Two sentences in the same spans that differ in one feature, with what follows each."""

    base: tuple[str, ...]
    source: tuple[str, ...]
    base_label: str
    source_label: str
    base_type: str
    source_type: str
    task: str = ""

    def at(self, span: int) -> Interchange:
        """The interchange at the last token of a span."""
        ends = [len("".join(spans[: span + 1])) for spans in (self.base, self.source)]
        return Interchange(
            base="".join(self.base),
            source="".join(self.source),
            answer=self.base_label,
            expected=self.source_label,
            base_end=ends[0],
            source_end=ends[1],
            label=self.base_type,
            source_label=self.source_type,
            group=self.task,
        )

    def swap(self) -> "MinimalPair":
        """The pair the other way round."""
        return MinimalPair(
            base=self.source,
            source=self.base,
            base_label=self.source_label,
            source_label=self.base_label,
            base_type=self.source_type,
            source_type=self.base_type,
            task=self.task,
        )


def read_pairs(path: str | Path) -> list[MinimalPair]:
    """Pairs from a JSON or JSONL file, in CausalGym's format or that of the agreement pairs. Raises BehaviorError."""
    return [_pair(row, number, Path(path).stem) for number, row in enumerate(read_list(path, "CausalGym"), 1)]


def _pair(row: Any, number: int, name: str) -> MinimalPair:
    known = [
        ("base", "src", "base_label", "src_label"),
        ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer"),
    ]
    for base, source, base_label, source_label in known:
        if isinstance(row, dict) and {base, source, base_label, source_label} <= set(row):
            one, other = (_spans(row[key]) for key in (base, source))
            if len(one) != len(other):
                raise BehaviorError(f"row {number}: base and source have different numbers of spans", got=(one, other))
            types = (row.get("base_type"), row.get("src_type"))
            if types[0] is None:
                # The case names the subject first: "singular_plural"; the counterpart has the other number.
                own = str(row.get("case", row[base_label])).split("_")[0]
                types = (own, {"singular": "plural", "plural": "singular"}.get(own, f"not {own}"))
            return MinimalPair(
                base=one,
                source=other,
                base_label=row[base_label],
                source_label=row[source_label],
                base_type=str(types[0]),
                source_type=str(types[1]),
                task=str(row.get("task", name)),
            )
    raise BehaviorError(
        f"row {number} is no minimal pair",
        got=sorted(row) if isinstance(row, dict) else type(row).__name__,
        wanted="base, src, base_label, src_label; or clean_prefix, patch_prefix, clean_answer, patch_answer",
    )


def _spans(value: Any) -> tuple[str, ...]:
    """A list of spans as it is; a text word by word, each with the space before it."""
    if isinstance(value, str):
        words = value.split(" ")
        return (words[0], *(f" {word}" for word in words[1:]))
    # the published sentences begin with the end-of-text token of the Pythia models, which is not every tokenizer's
    spans = [str(span).removeprefix(_END_OF_TEXT) for span in value if span != _END_OF_TEXT]
    return tuple(spans)


def template_names(path: str | Path) -> list[str]:
    """The tasks in a file of CausalGym's templates."""
    return list(_templates(path))


def _templates(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise missing("CausalGym", Path(path))
    return read_json(Path(path), what="CausalGym's templates")


def sample_template(path: str | Path, task: str, *, n: int, seed: int = 0) -> list[MinimalPair]:
    """`n` pairs from the published templates (`syntaxgym.json`), which differ in the task's label variables.

    Variables that share the part of their name before a dot are chosen together, as published. Raises BehaviorError
    for an unknown task.
    """
    data = _templates(path)
    if task not in data:
        raise BehaviorError("the templates hold no such task", got=task, wanted=did_you_mean(task, data))
    spec = data[task]
    rng = random.Random(f"headwater-causalgym:{task}:{seed}")
    return [_sampled(spec, task, rng) for _ in range(n)]


def _sampled(spec: dict[str, Any], task: str, rng: random.Random) -> MinimalPair:
    labels = spec["label"] if isinstance(spec["label"], list) else [spec["label"]]
    one, other = rng.sample(list(spec["labels"]), 2)
    rows: dict[str, int] = {}  # of variables that are chosen together: which
    base, source = [], []
    for span in filter(None, _SPANS.split(rng.choice(spec["templates"]))):
        values = [span, span]
        for variable in re.findall(r"\{(.+?)\}", span):
            options = spec["variables"][variable]
            group, dot, _ = variable.partition(".")
            if variable in labels:
                chosen = [rng.choice(options[one]), rng.choice(options[other])]
            elif dot:
                chosen = [options[rows.setdefault(group, rng.randrange(len(options)))]] * 2
            else:
                chosen = [rng.choice(options)] * 2
            values = [v.replace("{" + variable + "}", c) for v, c in zip(values, chosen, strict=True)]
        base.append(values[0])
        source.append(values[1])
    space = " " if spec["result_prepend_space"] else ""
    return MinimalPair(
        base=tuple(base),
        source=tuple(source),
        base_label=space + rng.choice(spec["labels"][one]),
        source_label=space + rng.choice(spec["labels"][other]),
        base_type=one,
        source_type=other,
        task=task,
    )


def causalgym(
    model: Model,
    pairs: Sequence[MinimalPair],
    *,
    sites: Sequence[str],
    methods: Sequence[str] = ("mean", "probe", "pca", "random", "full"),
    bases: dict[str, torch.Tensor | None] | None = None,
    n: int = 50,
    n_train: int = 100,
    seed: int = 0,
) -> PublishedScores:
    """The log-odds-ratio of one-dimensional interchanges at every span of the sentence, site by site.

    After Arora, Jurafsky & Potts (2024): log [p(base's word) / p(source's word)] without the change, less the same with
    it; 0 leaves the choice, the full swap at the right place reverses it. Directions are fitted at each site and span
    on training pairs. `overall` is, for each method, the mean over sites of the best span, as published; its interval
    is over sites. Pairs are also used the other way round (`n` counts both). `accuracy`: the share of sentences after
    which the model prefers the right word. Raises BehaviorError for too few pairs, or pairs with different numbers of
    spans.

    Known failure: the best span is chosen on the pairs that it is scored on, so that even a random direction's overall
    lies above 0: compare with it, not with 0.
    """
    began = time.perf_counter()
    usable = [pair for pair in pairs if _ids(model, pair) is not None]
    shuffled = random.Random(f"headwater-causalgym-split:{seed}").sample(usable, len(usable))
    # a test sentence must not have been trained on: distinct pairs share sentences where there are few
    tested, seen = shuffled[: max(1, n // 2)], set[tuple[str, ...]]()
    for pair in tested:
        seen |= {pair.base, pair.source}
    train = [pair for pair in shuffled if not {pair.base, pair.source} & seen][:n_train]
    if len(train) < 4 or not tested:
        raise BehaviorError(
            "too few pairs to fit and to judge",
            got=f"{len(tested)} and {len(train)} (of {len(pairs)}, usable {len(usable)})",
            fix="Give more pairs; those whose words are no tokens of their own are left out",
        )
    both = [*tested, *(pair.swap() for pair in tested)]
    spans = len(both[0].base)
    if any(len(pair.base) != spans for pair in (*both, *train)):
        raise BehaviorError("pairs of one task have the same number of spans", got=sorted({len(p.base) for p in both}))
    ids = torch.tensor([_ids(model, pair) for pair in both])
    clean = _margin(model.run(["".join(pair.base) for pair in both], logits="last").logits.float(), ids)
    rows: list[dict[str, Any]] = []
    best: dict[tuple[str, str], float] = {}
    task = both[0].task
    for site in sites:
        for span in range(spans):
            x = torch.cat([base_vectors(model, site, [p.at(span) for p in part]) for part in (train, _swapped(train))])
            labels = [p.base_type for p in train] + [p.source_type for p in train]
            chosen = {name: fit_subspace(name, x, labels, rank=1, seed=seed) for name in methods} | dict(bases or {})
            here = [pair.at(span) for pair in both]
            for name, basis in chosen.items():
                odds = clean - _margin(swapped(model, site, here, basis), ids)
                row = score_row(task, name, site, f"span {span}", "log_odds_ratio", odds.tolist(), share=False)
                rows.append(row)
                best[name, site] = max(best.get((name, site), -torch.inf), row["value"])
    for name in dict.fromkeys(name for name, _ in best):
        values = [best[name, site] for site in sites]
        rows.append(score_row(task, name, "all", "best span", "overall", values, share=False))
    return PublishedScores(
        tables={"scores": pl.DataFrame(rows, schema=SCHEMA)},
        facts={
            "benchmark": "CausalGym",
            "accuracy": float((clean > 0).float().mean()),
            "dropped": {"a label is no token of its own": len(pairs) - len(usable)},
        },
        config={"sites": list(sites), "n": n, "n_train": len(train), "seed": seed},
        provenance=Provenance.collect(model, seed=seed, seconds=time.perf_counter() - began),
    )


def _swapped(pairs: Sequence[MinimalPair]) -> list[MinimalPair]:
    return [pair.swap() for pair in pairs]


def _ids(model: Model, pair: MinimalPair) -> tuple[int, int] | None:
    """The tokens of the base's and the source's word after either sentence; None where they are none, or the same."""
    found = []
    for spans in (pair.base, pair.source):
        prompt = "".join(spans)
        found.append(tuple(first_token(model, prompt, word) for word in (pair.base_label, pair.source_label)))
    (own, other), again = found
    if own is None or other is None or own == other or again != (own, other):
        return None
    return own, other


def _margin(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    found = logits.gather(-1, ids.to(logits.device))
    return found[:, 0] - found[:, 1]
