"""What an edge outside a circuit carries: the counterfactual's value, nothing, a mean, another pair's value, a
constant.

A circuit's score depends on it (Miller et al., 2024), so an `Ablation` is named wherever a circuit is judged. Kinds
that run another text (`counterfactual`, `resample`) take every node's write from that run; the others give every node a
constant. A head's constant is one of its mixed values (over the deviation of a norm that follows its output
projection), so what the output projection adds by itself, its bias, is never ablated.

Shapes: T positions (1 where all are the same), H heads, K width of a head, D width of the stream.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.engine.edges import head_values
from headwater.localize.engine.passes import Batch, Engine, Seen
from headwater.localize.engine.wiring import Layer

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound

AblationKind = Literal["counterfactual", "zero", "mean", "mean_positional", "resample", "optimal"]
KINDS: tuple[AblationKind, ...] = ("counterfactual", "zero", "mean", "mean_positional", "resample", "optimal")
Over = Literal["prompt", "counterfactual", "both"]


@dataclass(frozen=True, eq=False)
class Constants:
    """One value a node: input [T, D], heads [H, T, K] a layer, mlps [T, D] a layer (before the block's multiplier).

    shared [T, D] a layer, or None: what the output projection's bias writes where a norm follows it.
    """

    input: Tensor
    heads: tuple[Tensor, ...]
    mlps: tuple[Tensor, ...]
    shared: tuple[Tensor | None, ...]

    def map(self, act: Callable[[Tensor], Tensor]) -> "Constants":
        """The same with `act` done to each tensor."""
        shared = tuple(None if s is None else act(s) for s in self.shared)
        return Constants(act(self.input), tuple(map(act, self.heads)), tuple(map(act, self.mlps)), shared)

    def tensors(self) -> dict[str, Tensor]:
        """As plain tensors by name: `input`, `heads` [L, H, T, K], `mlps` [L, T, D] and, where there is one,
        `shared`.
        """
        out = {"input": self.input, "heads": torch.stack(self.heads), "mlps": torch.stack(self.mlps)}
        shared = [s for s in self.shared if s is not None]
        return out | ({"shared": torch.stack(shared)} if shared else {})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Constants":
        """What `tensors` gave."""
        heads, mlps = tuple(tensors["heads"]), tuple(tensors["mlps"])
        shared = tuple(tensors["shared"]) if "shared" in tensors else (None,) * len(heads)
        return cls(tensors["input"], heads, mlps, shared)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablation:
    """kind: what an edge outside the circuit carries.

    "counterfactual": its source's write on the pair's counterfactual. "zero": nothing. "mean": its source's mean write,
    the same at every position. "mean_positional": the mean at each position, over pairs of the same length. "resample":
    its source's write on another pair of the same length, drawn by `seed` (Chan et al., 2022); a pair that is alone
    with its length keeps its own counterfactual. "optimal": constants that were learned (`optimal_ablation`; Li &
    Janson, 2024). over: whose texts are averaged or drawn: means are over counterfactuals unless said (Wang et al.,
    2022), draws over prompts.
    """

    kind: AblationKind = "counterfactual"
    over: Over | None = None
    seed: int = 0
    constants: Constants | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MethodError("unknown ablation", got=repr(self.kind), wanted=did_you_mean(str(self.kind), KINDS))
        if self.over not in (None, "prompt", "counterfactual", "both"):
            wanted = did_you_mean(str(self.over), ["prompt", "counterfactual", "both"])
            raise MethodError("unknown texts to ablate by", got=repr(self.over), wanted=wanted)
        if self.kind == "resample" and self.over == "both":
            raise MethodError("a pair is resampled from prompts or from counterfactuals", got="over='both'")

    @property
    def runs_text(self) -> bool:
        """Whether edges carry what nodes write on some other text."""
        return self.kind in ("counterfactual", "resample")

    @property
    def learns(self) -> bool:
        """Whether its constants are still to be learned."""
        return self.kind == "optimal" and self.constants is None

    @property
    def texts(self) -> Over:
        """Whose texts are averaged or drawn."""
        return self.over or ("prompt" if self.kind == "resample" else "counterfactual")

    def to_config(self) -> dict[str, Any]:
        """As plain data, without learned constants."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.kind in ("mean", "mean_positional", "resample"):
            out["over"] = self.texts
        return out | ({"seed": self.seed} if self.kind == "resample" else {})


AblationLike = Any
"""A kind's name, an `Ablation`, or a result that has one as `.ablation`."""


def as_ablation(given: AblationLike) -> Ablation:
    """The ablation that a name, an `Ablation`, or a result of `optimal_ablation` means. Raises MethodError."""
    if isinstance(given, Ablation):
        return given
    own = getattr(given, "ablation", None)
    if isinstance(own, Ablation):
        return own
    if not isinstance(given, str):
        raise MethodError("not an ablation", got=type(given).__name__, wanted=f"one of {', '.join(KINDS)}")
    return Ablation(kind=given)  # type: ignore[arg-type]


def as_ablations(given: AblationLike) -> list[Ablation]:
    """One or several ablations, each named once."""
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not several:
        raise MethodError("name an ablation", wanted=", ".join(KINDS))
    return [as_ablation(one) for one in several]


def ablation_names(ablations: Sequence[Ablation]) -> list[str]:
    """What to call each: its kind, numbered where kinds repeat."""
    names: list[str] = []
    for one in ablations:
        same = sum(name.split(" ")[0] == one.kind for name in names)
        names.append(f"{one.kind} {same + 1}" if same else one.kind)
    return names


@dataclass(frozen=True, eq=False)
class Prepared:
    """An ablation made ready for a behavior's pairs on one model."""

    ablation: Ablation
    constants: dict[int, Constants] | None = None
    """By length of the prompt; one for all lengths under key 0."""
    others: dict[int, Tensor] | None = None
    """Row of a pair -> token ids of the pair drawn for it."""

    @property
    def passes(self) -> float:
        """Forward passes a pair that preparing took."""
        return {"both": 2.0}.get(self.ablation.texts, 1.0) if self.ablation.kind in ("mean", "mean_positional") else 0.0

    def ids(self, batch: Batch) -> Tensor:
        """[B, T] the text whose writes edges carry (of constants: the counterfactual, whose streams are then
        shifted).
        """
        return batch.corrupt if self.others is None else torch.stack([self.others[row] for row in batch.rows])

    def constants_for(self, length: int) -> Constants | None:
        """The nodes' constants for prompts of this length; None where another text is run."""
        return None if self.constants is None else self.constants.get(length, self.constants.get(0))


def prepare(engine: Engine, bound: "Bound", batches: Sequence[Batch], ablation: Ablation) -> Prepared:
    """Compute what an ablation needs from the pairs: means, or who is drawn for whom.

    Raises MethodError for "optimal" without learned constants.
    """
    kind = ablation.kind
    if kind == "resample":
        return Prepared(ablation, others=_drawn(bound, ablation))
    if kind == "zero":
        return Prepared(ablation, constants={0: zeros(engine)})
    if kind in ("mean", "mean_positional"):
        return Prepared(
            ablation, constants=means(engine, batches, ablation.texts, positional=kind == "mean_positional")
        )
    if kind == "optimal":
        if ablation.constants is None:
            raise MethodError(
                "optimal ablation needs constants that were learned",
                fix="Pass ablation=hw.localize.optimal_ablation(model, behavior, circuit=circuit)",
            )
        own = ablation.constants.map(lambda x: x.to(engine.model.device, engine.model.dtype))
        _check_fit(engine, own)
        return Prepared(replace(ablation, constants=own), constants={0: own})
    return Prepared(ablation)


def zeros(engine: Engine) -> Constants:
    """Every node writes nothing."""
    graph, width = engine.wiring.graph, engine.wiring.d_model
    like = {"device": engine.model.device, "dtype": engine.model.dtype}
    layers = engine.wiring.layers
    heads = [torch.zeros(graph.n_heads, 1, layer.attention.out_weight_HKD().shape[1], **like) for layer in layers]
    nothing = torch.zeros(1, width, **like)
    shared = tuple(nothing if _has_shared(layer) else None for layer in layers)
    return Constants(nothing, tuple(heads), (nothing,) * len(layers), shared)


def means(engine: Engine, batches: Sequence[Batch], over: Over, *, positional: bool) -> dict[int, Constants]:
    """Mean writes over the batches' texts: under key 0 over all positions, or by length, at each position."""
    totals: dict[int, tuple[Constants, int]] = {}
    with engine.open():
        for batch in batches:
            texts = {"prompt": [batch.clean], "counterfactual": [batch.corrupt], "both": [batch.clean, batch.corrupt]}
            for ids in texts[over]:
                summed = _summed(engine, ids, positional=positional)
                key = ids.shape[1] if positional else 0
                count = len(ids) * (1 if positional else ids.shape[1])
                before = totals.get(key)
                totals[key] = (summed, count) if before is None else (_added(before[0], summed), before[1] + count)
    dtype = engine.model.dtype
    return {key: c.map(lambda x, n=count: (x / n).to(dtype)) for key, (c, count) in totals.items()}


def writes_of(engine: Engine, seen: Seen) -> Constants:
    """What every node writes in one pass, by pair and position: as `Constants`, with T = B x T positions side by
    side.
    """
    assert seen.embed is not None
    work, layers = seen.embed.dtype, engine.wiring.layers
    return Constants(
        _flat(seen.embed),
        tuple(head_values(layer, seen, index, work) for index, layer in enumerate(layers)),
        tuple(_flat(y) for y in seen.mlp_out),
        tuple(shared_write(layer, seen, index, work) for index, layer in enumerate(layers)),
    )


def shared_write(layer: Layer, seen: Seen, index: int, work: torch.dtype) -> Tensor | None:
    """[N, D]: what the output projection's bias writes where a norm divides it by the whole's deviation, else None."""
    if not _has_shared(layer):
        return None
    _, inverse = layer.post_norm.standardize(_flat(seen.mixed[index]).to(work))
    bias = layer.attention.out_proj.bias.detach().to(work)  # type: ignore[union-attr]
    return inverse * layer.post_norm.fold(bias) * layer.attention.write.scale


def _has_shared(layer: Layer) -> bool:
    return layer.post_norm.module is not None and getattr(layer.attention.out_proj, "bias", None) is not None


def _summed(engine: Engine, ids: Tensor, *, positional: bool) -> Constants:
    length = ids.shape[1]

    def total(x: Tensor) -> Tensor:
        x = x.double()
        x = x.view(*x.shape[:-2], -1, length, x.shape[-1]).sum(dim=-3)
        return x if positional else x.sum(dim=-2, keepdim=True)

    return writes_of(engine, engine.run(ids, None)).map(total)


def _added(a: Constants, b: Constants) -> Constants:
    shared = tuple(None if x is None or y is None else x + y for x, y in zip(a.shared, b.shared, strict=True))
    heads, mlps = zip(a.heads, b.heads, strict=True), zip(a.mlps, b.mlps, strict=True)
    return Constants(a.input + b.input, tuple(x + y for x, y in heads), tuple(x + y for x, y in mlps), shared)


def _drawn(bound: "Bound", ablation: Ablation) -> dict[int, Tensor]:
    """A cycle through the pairs of each length in random order: nobody is drawn for itself."""
    generator = torch.Generator().manual_seed(ablation.seed)
    out: dict[int, Tensor] = {}
    by_length: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
    for group in bound.groups:
        own = zip(group.rows, group.clean, group.corrupt, strict=True)
        by_length.setdefault(group.clean.shape[1], []).extend(own)
    for pairs in by_length.values():
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for at, other in zip(order, [*order[1:], order[0]], strict=True):
            row, _, corrupt = pairs[at]
            _, clean, theirs = pairs[other]
            out[row] = corrupt if len(pairs) == 1 else clean if ablation.texts == "prompt" else theirs
    return out


def _check_fit(engine: Engine, constants: Constants) -> None:
    like = zeros(engine)
    shapes = [[tuple(x.shape[:-2] + x.shape[-1:]) for x in (c.input, *c.heads, *c.mlps)] for c in (like, constants)]
    if shapes[0] != shapes[1]:
        raise MethodError("these constants are of another model", got=shapes[1][:2], wanted=shapes[0][:2])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
