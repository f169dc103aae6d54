"""What headwater knows of a model's inside: which module's input or output each site is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from headwater.core.errors import ModelError


@dataclass(frozen=True, eq=False)
class Port:
    """One tensor that passes a module: an argument on its way in, or an output.

    `key` is the argument's position or name (side "in"), or the index into a tuple of outputs (side "out"; None: the
    output itself). A `flat` port holds [B*T, D] where everything else holds [B, T, D].
    """

    module: nn.Module
    name: str
    side: Literal["in", "out"]
    key: int | str | None = None
    flat: bool = False

    def __str__(self) -> str:
        return f"{self.name}.{self.side}" + (f"[{self.key}]" if self.key is not None else "")


@dataclass(frozen=True, eq=False)
class Write:
    """A tensor which, times `scale`, is added to the residual stream."""

    port: Port
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention sub-layer, self or cross.

    module calls the attention function; `entry` is what it reads; `out_proj` is a linear module on the flattened z.
    """

    module: nn.Module
    name: str
    entry: Port
    out_proj: nn.Module
    out_proj_name: str
    write: Write
    norm: nn.Module | None
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    method: str | None = None
    """Name of the module's own attention method, where it does not use transformers' attention interface."""

    def out_weight_HKD(self) -> torch.Tensor:
        """The output projection as one [K, D] matrix a head: a head's write is `z_h @ out_weight[h]` (before post-norm
        and scale)."""
        weight = linear_weight(self.out_proj)
        return weight.T.reshape(self.n_heads, self.d_value, -1)


@dataclass(frozen=True, eq=False)
class Mlp:
    """One MLP (or mixture of experts): what it reads, its neurons, what it adds."""

    entry: Port
    write: Write
    norm: nn.Module | None
    neurons: Port | None = None
    down_proj: nn.Module | None = None
    experts: nn.Module | None = None
    experts_name: str = ""


@dataclass(frozen=True, eq=False)
class Mixer:
    """A token mixer that is not attention (state-space, linear recurrence): only its way in and out is known."""

    entry: Port
    write: Write


@dataclass(frozen=True, eq=False)
class Block:
    """One layer. `order` says how its parts share the stream.

    sequential: attention is added, then the MLP reads the sum · parallel: both read the block's input ·
    post_norm: the stream is normalized after each sum (BERT), so it is not the sum of its writes · mixer: no attention.
    """

    index: int
    module: nn.Module
    name: str
    input: Port
    output: Port
    order: Literal["sequential", "parallel", "post_norm", "mixer", "opaque"]
    attention: Attention | None = None
    cross: Attention | None = None
    mlp: Mlp | None = None
    mixer: Mixer | None = None
    mid: Port | None = None
    """The stream before the MLP."""
    cross_mid: Port | None = None
    """The stream before cross-attention."""

    @cached_property
    def plain(self) -> dict[str, Port]:
        """Sites that are a module's whole output, as it is: nothing scaled, nothing flattened."""
        writes = {"attn_out": self.attention, "mlp_out": self.mlp, "mixer_out": self.mixer}
        found = {kind: part.write.port for kind, part in writes.items() if part and part.write.scale == 1.0}
        found["resid_post"] = self.output
        return {kind: port for kind, port in found.items() if port.side == "out" and not port.flat}

    @cached_property
    def flat(self) -> bool:
        """Whether any port of this block that a site may be read at is flat."""
        ports = [self.input, self.output, self.mid, self.cross_mid]
        for part in (self.attention, self.cross, self.mlp, self.mixer):
            ports += [part.entry, part.write.port] if part else []
        ports += [self.mlp.neurons] if self.mlp else []
        return any(port is not None and port.flat for port in ports)


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of blocks with one residual stream."""

    prefix: str
    name: str
    blocks: tuple[Block, ...]
    d_model: int
    final_norm: nn.Module | None = None

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(eq=False)
class Anatomy:
    """Where each site lives in one model, as measured by a traced forward; what did not hold is in `refused`."""

    family: str
    stacks: dict[str, Stack]
    main: Stack
    unembed: nn.Module | None
    has_logits: bool
    refused: dict[str, str] = field(default_factory=dict)
    """Kind of site (with its stack's prefix) -> why this model has none."""

    def kinds(self, stack: Stack, block: Block) -> dict[str, bool]:
        """Kinds of site that a block has."""
        attention, cross, mlp, mixer = block.attention, block.cross, block.mlp, block.mixer
        has = {"resid_pre": True, "resid_post": True, "resid_mid": block.mid is not None}
        for prefix, part in (("", attention), ("cross_", cross)):
            for kind in ("attn_in", "attn_out", "q", "k", "v", "scores", "pattern", "z", "head"):
                has[prefix + kind] = part is not None
        has |= {"mlp_in": mlp is not None, "mlp_out": mlp is not None}
        has["neurons"] = mlp is not None and (mlp.neurons is not None or mlp.experts is not None)
        has |= {"mixer_in": mixer is not None, "mixer_out": mixer is not None}
        slash = f"{stack.prefix}/" if stack.prefix else ""
        return {kind: yes and slash + kind not in self.refused for kind, yes in has.items()}


def _offloaded(module: nn.Module) -> torch.Tensor:
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "weights_map", None) is not None:
            return one.weights_map["weight"].to(one.execution_device)  # type: ignore[union-attr]
    raise ModelError(f"a weight of {type(module).__name__} is not in memory", fix="Load the model onto a device")


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear module as [out, in], whichever way it is stored, and also where accelerate holds it
    elsewhere while the module does not run."""
    weight = module.weight
    if isinstance(weight, torch.Tensor) and weight.device.type == "meta":
        weight = _offloaded(module)
    if type(module).__name__ == "Conv1D":
        weight = weight.T
    return weight  # type: ignore[return-value]
