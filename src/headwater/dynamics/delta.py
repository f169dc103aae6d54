"""What changed between two checkpoints or models of one shape: which parts moved, and was a mechanism taken away or
only wrapped.

    from headwater.dynamics.delta import delta

    delta("base", "tuned", behavior)   # a behavior that the first has and the second has lost
"""

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, ModelError
from headwater.core.loading import load, opened
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

FRACTIONS = (0.001, 0.003, 0.01, 0.03, 0.1)
ENOUGH = 0.5
"""Share of what was lost that must come back for a capability to count as wrapped."""
_COMPONENTS: dict[str, Any] = {
    "component": pl.String, "kind": pl.String, "layer": pl.Int64, "weights": pl.Int64, "norm": pl.Float64,
    "change": pl.Float64, "relative": pl.Float64, "share": pl.Float64, "cosine": pl.Float64,
}  # fmt: skip
_LAYERS: dict[str, Any] = {
    "layer": pl.Int64, "value": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "back": pl.Float64,
    "probe_old": pl.Float64, "probe_new": pl.Float64, "probe_classes": pl.Int64,
}  # fmt: skip
_REVIVAL: dict[str, Any] = {
    "how": pl.String, "fraction": pl.Float64, "weights": pl.Int64, "value": pl.Float64, "lo": pl.Float64,
    "hi": pl.Float64, "back": pl.Float64, "null": pl.Float64, "null_most": pl.Float64,
}  # fmt: skip


@register_result
class DeltaResult(Result):
    """`tables["components"]`: component, kind (embedding, attention, mlp, norm, other), layer, weights, norm (L2, old),
    change (L2 of the difference), relative (change / norm), share (of all squared change), cosine (of old and new).

    With a behavior: `tables["revival"]`: how ("prune": the most moved weights to 0; "restore": to their old values),
    fraction (of the weights in the blocks' matrices), weights, value (the metric), lo, hi, back (share of what was lost
    that is there again), null, null_most (mean and largest `back` of as many random weights of the same matrices).
    `tables["layers"]`: layer, value, lo, hi, back of the new model up to this layer read on by the old one; probe_old,
    probe_new: accuracy of a linear probe for the answer at the last token (null where the answers are too many to
    probe), probe_classes. facts: metric, old, new, lost and its interval, verdict ("wrapper", "mechanism", "nothing
    lost", "no behavior given"), why.
    """

    kind: ClassVar[str] = "delta"
    main: ClassVar[str] = "components"

    @property
    def verdict(self) -> str:
        return str(self.facts["verdict"])


def delta(
    old: "Model | str | Path",
    new: "Model | str | Path",
    behavior: "Behavior | None" = None,
    *,
    metric: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 5,
    names: tuple[str, str] | None = None,
    seed: int = 0,
) -> DeltaResult:
    """What changed from one model to another, and, for a behavior that was lost, whether its mechanism is still there.

    Fine-tuning often wraps an old capability in a small change and leaves it whole underneath (Jain et al., 2023):
    pruning the weights that moved most, few of them, brings it back, which random weights do not; a probe still finds
    the answer; and the old model's later layers still read it from the new one's stream. The verdict is `wrapper` where
    pruning at most the largest of `fractions` brings back half of the metric that was lost, and more than any of
    `draws` random sets did; `mechanism` where it does not.

    Known failure: `mechanism` is an absence: another way to prune may still revive it. Weights that moved most are not
    those that matter most where layers differ in scale.

    Raises ModelError for models of other shapes, MethodError for fractions outside (0, 1].
    """
    started = time.monotonic()
    if not fractions or not all(0 < one <= 1 for one in fractions) or draws < 1:
        raise MethodError(
            "these fractions of weights do not fit", got=f"{list(fractions)}, {draws} draws", wanted="(0, 1]"
        )
    a, b = (opened(one) for one in (old, new))
    before, after = _weights(a), _weights(b)
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        raise ModelError("the two models are of other shapes", got=f"{a.name}, {b.name}")
    tables = {"components": pl.DataFrame(_components(a, before, after), schema=_COMPONENTS)}
    facts: dict[str, Any] = {"names": list(names or (a.name, b.name)), "verdict": "no behavior given", "why": ""}
    if behavior is not None:
        found = _Lost(a, b, before, after, behavior, metric or behavior.metric, seed)
        facts |= found.facts
        tables["revival"] = pl.DataFrame(found.revival(fractions, draws), schema=_REVIVAL)
        tables["layers"] = pl.DataFrame(found.layers(), schema=_LAYERS)
        facts |= _verdict(tables["revival"], facts)
    return DeltaResult(
        tables=tables,
        facts=facts,
        config={"fractions": list(fractions), "draws": draws, "seed": seed},
        provenance=Provenance.collect(b, behavior, seed=seed, seconds=time.monotonic() - started),
    )


class _Lost:
    """A behavior that the old model has; a working copy of the new one whose weights are set and set back."""

    def __init__(
        self, a: "Model", b: "Model", before: Mapping[str, Tensor], after: Mapping[str, Tensor],
        behavior: "Behavior", metric: str, seed: int,
    ) -> None:  # fmt: skip
        self.a, self.b, self.before, self.after = a, b, before, after
        self.behavior, self.metric, self.seed = behavior, metric, seed
        self.work = load(copy.deepcopy(b.hf), tokenizer=b.tokenizer)
        self._own = dict(self.work.hf.named_parameters())
        self.old, self.new = self._value(a), self._value(b)
        self.lost = self.old[0] - self.new[0]
        self.facts = {
            "metric": metric, "old": list(self.old), "new": list(self.new), "lost": self.lost,
            "clear": bool(self.old[1] > self.new[2]),
        }  # fmt: skip
        self.places = _places(b)
        # matrices of the blocks: what attention and MLPs compute with
        self.matrices = [
            name for name, weight in before.items() if weight.ndim >= 2 and self.places[name][1] is not None
        ]

    def _value(self, model: "Model") -> tuple[float, float, float]:
        from headwater.behavior.evaluate import evaluate

        report = evaluate(model, self.behavior, metrics=(self.metric,), canary=False, seed=self.seed)
        return report.interval(self.metric)

    def _with(self, changed: Mapping[str, Tensor]) -> tuple[float, float, float]:
        """The metric with these weights in place of the new model's."""
        with torch.no_grad():
            for name, weight in changed.items():
                self._own[name].copy_(weight)
        try:
            return self._value(self.work)
        finally:
            with torch.no_grad():
                for name in changed:
                    self._own[name].copy_(self.after[name])

    def _back(self, value: float) -> float:
        return (value - self.new[0]) / self.lost if self.lost else float("nan")

    def revival(self, fractions: Sequence[float], draws: int) -> list[dict[str, Any]]:
        moved = torch.cat([(self.after[n] - self.before[n]).abs().flatten() for n in self.matrices])
        order = torch.argsort(moved, descending=True, stable=True)
        sizes = [self.after[name].numel() for name in self.matrices]
        zero = {name: torch.zeros_like(self.after[name]) for name in self.matrices}
        rows: list[dict[str, Any]] = []
        for fraction in track(fractions, "pruning what moved most"):
            n = max(1, round(fraction * len(order)))
            chosen = torch.zeros(len(order), dtype=torch.bool)
            chosen[order[:n]] = True
            masks = list(chosen.split(sizes))
            for how, to in (("prune", zero), ("restore", self.before)):
                value, lo, hi = self._with(self._put(masks, to))
                null = [self._back(self._with(self._put(self._random(masks, draw), to))[0]) for draw in range(draws)]
                rows.append(
                    {"how": how, "fraction": fraction, "weights": n, "value": value, "lo": lo, "hi": hi,
                     "back": self._back(value), "null": float(np.mean(null)), "null_most": float(np.max(null))}
                )  # fmt: skip
        return rows

    def _put(self, masks: Sequence[Tensor], to: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.where(mask.view(self.after[name].shape), to[name], self.after[name])
            for name, mask in zip(self.matrices, masks, strict=True)
            if bool(mask.any())
        }

    def _random(self, masks: Sequence[Tensor], draw: int) -> list[Tensor]:
        """As many weights of each matrix."""
        generator = torch.Generator().manual_seed(1000 * self.seed + draw)
        return [mask[torch.randperm(len(mask), generator=generator)] for mask in masks]

    def layers(self) -> list[dict[str, Any]]:
        probes = [_probed(model, self.behavior) for model in (self.a, self.b)]
        # from the last layer down: ever more of the old model reads on
        theirs: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        for layer in track(range(self.b.n_layers - 1, -1, -1), "reading the new with the old"):
            value, lo, hi = self._with(theirs | self._after_blocks())
            rows.append(
                {"layer": layer, "value": value, "lo": lo, "hi": hi, "back": self._back(value),
                 "probe_old": probes[0][0].get(layer), "probe_new": probes[1][0].get(layer),
                 "probe_classes": probes[0][1]}
            )  # fmt: skip
            theirs |= {name: self.before[name] for name in self.before if self.places[name][1] == layer}
        return rows[::-1]

    def _after_blocks(self) -> dict[str, Tensor]:
        """The old model's final norm and unembedding (of tied embeddings, which are read first, the new ones stay)."""
        first = {id(weight) for weight in self.b.hf.get_input_embeddings().parameters()}
        own = dict(self.b.hf.named_parameters())
        late = [name for name in self.before if self.places[name][0] in ("unembedding", "final norm")]
        return {name: self.before[name] for name in late if id(own[name]) not in first}


def _verdict(revival: pl.DataFrame, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not facts["clear"]:
        return {
            "verdict": "nothing lost",
            "why": f"{facts['metric']} is {facts['old'][0]:.3g} before and {facts['new'][0]:.3g} after",
        }
    pruned = revival.filter(pl.col("how") == "prune").sort("fraction").to_dicts()
    for one in pruned:
        if one["back"] >= ENOUGH and one["back"] > one["null_most"]:
            why = (
                f"pruning {one['fraction']:.2%} of the weights, those that moved most, brings back {one['back']:.0%} "
                f"of what was lost; random ones at most {one['null_most']:.0%}"
            )
            return {"verdict": "wrapper", "why": why}
    best = max(pruned, key=lambda one: one["back"])
    why = (
        f"pruning up to {pruned[-1]['fraction']:.2%} of the weights, those that moved most, brings back "
        f"{max(0.0, best['back']):.0%} of what was lost; random ones at most {best['null_most']:.0%}"
    )
    return {"verdict": "mechanism", "why": why}


def _weights(model: "Model") -> dict[str, Tensor]:
    return {name: weight.detach().float().cpu() for name, weight in model.hf.named_parameters()}


def _places(model: "Model") -> dict[str, tuple[str, int | None]]:
    """Name of each weight -> (kind, layer): what part it is of."""
    of: dict[int, tuple[str, int | None]] = {}

    def put(module: Any, kind: str, layer: int | None) -> None:
        for weight in module.parameters() if module is not None else ():
            of.setdefault(id(weight), (kind, layer))  # the first that claims it: of tied embeddings, the embedding

    for block in model.anatomy.main.blocks:
        for part in (block.attention, block.mlp):
            put(getattr(part, "norm", None), "norm", block.index)
        put(block.attention.module if block.attention is not None else None, "attention", block.index)
        put(block.module, "mlp" if block.mlp is not None else "other", block.index)
    put(model.hf.get_input_embeddings(), "embedding", None)
    put(model.anatomy.unembed, "unembedding", None)
    put(model.anatomy.main.final_norm, "final norm", None)
    return {name: of.get(id(weight), ("other", None)) for name, weight in model.hf.named_parameters()}


def _components(model: "Model", before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    places, groups = _places(model), dict[tuple[str, int | None], list[str]]()
    for name in before:
        groups.setdefault(places[name], []).append(name)
    rows: list[dict[str, Any]] = []
    for (kind, layer), members in groups.items():
        x = torch.cat([before[name].double().flatten() for name in members])
        y = torch.cat([after[name].double().flatten() for name in members])
        norm, change = float(x.norm()), float((y - x).norm())
        both = norm * float(y.norm())
        rows.append(
            {"component": kind if layer is None else f"{kind} {layer}", "kind": kind, "layer": layer,
             "weights": len(x), "norm": norm, "change": change, "relative": change / norm if norm else float("nan"),
             "share": change**2, "cosine": float(x @ y) / both if both else float("nan")}
        )  # fmt: skip
    total = sum(row["share"] for row in rows)
    for row in rows:
        row["share"] = row["share"] / total if total else 0.0
    return rows


def _probed(model: "Model", behavior: "Behavior") -> tuple[dict[int, float], int]:
    """(layer -> accuracy on test pairs of a ridge probe for the answer at the last token, number of answers); empty
    where there is no train or no test split, or fewer than three prompts for an answer."""
    bound = behavior.bind(model)
    frame = bound.frame
    answers = [one[0] for one in frame["answers"].to_list()]
    splits = np.array(frame["split"].to_list())
    classes = sorted(set(answers))
    if len(classes) < 2 or not {"train", "test"} <= set(splits) or (splits == "train").sum() < 3 * len(classes):
        return {}, len(classes)
    target = torch.tensor([[answer == one for one in classes] for answer in answers]).double()
    run = model.run(
        frame["prompt"].to_list(), capture=[f"resid_post.{n}@-1" for n in range(model.n_layers)], logits="none"
    )
    train, test = torch.from_numpy(splits == "train"), torch.from_numpy(splits == "test")
    found: dict[int, float] = {}
    for layer in range(model.n_layers):
        x = run[f"resid_post.{layer}@-1"].double().cpu()
        x = (x - x[train].mean(dim=0)) / x[train].std(dim=0).clamp(min=1e-6)
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        gram = x[train].T @ x[train]
        ridge = gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        map_ = torch.linalg.solve(ridge, x[train].T @ target[train])
        found[layer] = float(((x[test] @ map_).argmax(dim=1) == target[test].argmax(dim=1)).double().mean())
    return found, len(classes)
