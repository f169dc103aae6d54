"""What nodes write in one run more than in another, than on average, or than nothing.

Shapes: B pairs, T positions run, N = B T, D width, H heads of width K.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.engine.passes import Batch, Engine, Seen
from headwater.localize.engine.wiring import Layer

Against = Literal["counterfactual", "mean", "mean_positional", "zero"]
_AGAINST: tuple[Against, ...] = ("counterfactual", "mean", "mean_positional", "zero")


@dataclass(eq=False)
class Fixed:
    """What nodes write instead, the same for every pair: a mean over prompts, by position or not, or zero (empty).

    embed: [P, D]; values: [H, P, K], mlp: [P, D] and neurons: [P, M] by layer; P is 1, or the positions counted from
    the end. Of a head it is the mixed values that are replaced: the output projection's bias is no head's and stays.
    """

    embed: Tensor | None = None
    values: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)


Other = Seen | Fixed
"""What a run is compared with: a run of the same shape, or fixed values."""


def head_values(layer: Layer, seen: Seen, index: int, work: torch.dtype) -> Tensor:
    """[H, N, K]: each head's mixed values, over the deviation that a norm after the output projection divides by."""
    z = _flat(seen.z[index]).to(work)
    if layer.post_norm.module is not None:
        _, inverse = layer.post_norm.standardize(_flat(seen.mixed[index]).to(work))
        z = z * inverse
    return z.view(len(z), layer.attention.n_heads, -1).transpose(0, 1)


def post_norm_constant(layer: Layer, clean: Seen, corrupt: Seen, index: int, work: torch.dtype) -> Tensor | None:
    """[N, D]: how the output projection's bias, divided by that deviation, differs; None where it does not."""
    bias = getattr(layer.attention.out_proj, "bias", None)
    if layer.post_norm.module is None or bias is None:
        return None
    ours, theirs = (layer.post_norm.standardize(_flat(s.mixed[index]).to(work))[1] for s in (clean, corrupt))
    return (ours - theirs) * layer.post_norm.fold(bias.detach().to(work)) * layer.attention.write.scale


def head_differences(layer: Layer, clean: Seen, other: Other, index: int, work: torch.dtype) -> Tensor:
    """[H, N, K]: how each head's values differ."""
    ours = head_values(layer, clean, index, work)
    if isinstance(other, Seen):
        return ours - head_values(layer, other, index, work)
    return ours - _spread(other.values[index], ours, clean) if other.values else ours


def constant_differences(layer: Layer, clean: Seen, other: Other, index: int, work: torch.dtype) -> Tensor | None:
    """[N, D]: as `post_norm_constant`; None against fixed values, where the bias stays."""
    return post_norm_constant(layer, clean, other, index, work) if isinstance(other, Seen) else None


def attention_differences(layer: Layer, clean: Seen, other: Other, index: int, work: torch.dtype) -> Tensor:
    """[N, D]: how what attention adds differs, before the block's multiplier: the sum over its heads."""
    values = head_differences(layer, clean, other, index, work)
    weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach().to(work))
    found = values.transpose(0, 1).flatten(1) @ weight.flatten(0, 1)
    constant = constant_differences(layer, clean, other, index, work)
    return found if constant is None else found + constant / layer.attention.write.scale


def mlp_differences(clean: Seen, other: Other, index: int, work: torch.dtype) -> Tensor:
    """[N, D]: how what the MLP adds differs, before the block's multiplier."""
    ours = _flat(clean.mlp_out[index]).to(work)
    if isinstance(other, Seen):
        return ours - _flat(other.mlp_out[index]).to(work)
    return ours - _spread(other.mlp[index], ours, clean) if other.mlp else ours


def neuron_differences(clean: Seen, other: Other, index: int) -> Tensor:
    """[N, M]: how the MLP's neurons differ, for runs that kept them."""
    ours = _flat(clean.neurons[index])
    if isinstance(other, Seen):
        return ours - _flat(other.neurons[index])
    return ours - _spread(other.neurons[index], ours, clean) if other.neurons else ours


def embed_differences(clean: Seen, other: Other, work: torch.dtype) -> Tensor:
    """[N, D]: how the stream that enters the first block differs."""
    assert clean.embed is not None
    ours = _flat(clean.embed).to(work)
    if isinstance(other, Seen):
        assert other.embed is not None
        return ours - _flat(other.embed).to(work)
    return ours if other.embed is None else ours - _spread(other.embed, ours, clean)


def _spread(fixed: Tensor, like: Tensor, clean: Seen) -> Tensor:
    """Fixed values [..., P, K] as those of B pairs [..., N, K]; a layer run at the last positions only takes those."""
    assert clean.embed is not None
    size = clean.embed.shape[0]
    if fixed.shape[-2] == 1:
        return fixed
    steps = like.shape[-2] // size
    fixed = fixed[..., -steps:, :].to(like.dtype)
    return fixed.repeat(*[1] * (fixed.ndim - 2), size, 1)


# --- means


def check_against(against: str) -> None:
    """Raises MethodError for a reference that there is not."""
    if against not in _AGAINST:
        raise MethodError(
            "unknown reference of scores", got=f"against={against!r}", wanted=did_you_mean(str(against), _AGAINST)
        )


def fixed_values(engine: Engine, batches: Iterable[Batch], against: Against, *, neurons: bool = False) -> Fixed:
    """The means of every node over the prompts of these batches (whole prompts: no prefix left out), or zero.

    "mean": over prompts and positions. "mean_positional": at each position counted from the end, over the prompts that
    have it.
    """
    if against == "zero":
        return Fixed()
    layers = engine.wiring.layers
    sums: dict[tuple[str, int], Tensor] = {}
    counts = torch.zeros(0, dtype=torch.float64)
    with engine.open():
        for batch in batches:
            seen = engine.run(batch.clean, None, neurons=neurons)
            assert seen.embed is not None
            size, steps = seen.embed.shape[:2]
            found: dict[tuple[str, int], Tensor] = {("embed", 0): _flat(seen.embed)[None]}
            for index, layer in enumerate(layers):
                found["values", index] = head_values(layer, seen, index, engine.work)
                found["mlp", index] = _flat(seen.mlp_out[index])[None]
                if neurons:
                    found["neurons", index] = _flat(seen.neurons[index])[None]
            for key, value in found.items():
                total = value.double().reshape(len(value), size, steps, -1).sum(dim=1)
                sums[key] = _longer(sums[key], total) if key in sums else total
            counts = _longer(counts[None, :, None], torch.full((1, steps, 1), size, dtype=torch.float64))[0, :, 0]
    device = engine.model.device

    def mean(key: tuple[str, int]) -> Tensor:
        total = sums[key]
        if against == "mean":
            total = total.sum(dim=1, keepdim=True) / counts.sum()
        else:
            total = total / counts[:, None].to(total.device)
        return total.to(device=device, dtype=engine.work)

    return Fixed(
        mean(("embed", 0))[0],
        [mean(("values", i)) for i in range(len(layers))],
        [mean(("mlp", i))[0] for i in range(len(layers))],
        [mean(("neurons", i))[0] for i in range(len(layers))] if neurons else [],
    )


def _longer(a: Tensor, b: Tensor) -> Tensor:
    """The sum of [..., P, K] and [..., Q, K], aligned at their ends."""
    if a.shape[-2] < b.shape[-2]:
        a, b = b, a
    if b.shape[-2] == 0:
        return a
    a = a.clone()
    a[..., -b.shape[-2] :, :] += b
    return a


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
