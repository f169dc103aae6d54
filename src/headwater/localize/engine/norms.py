"""Normalizations as arithmetic: which of the known forms a module is gets measured, so that Jacobians are exact and
cheap.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

# RMSNorms of transformers compute in float32 whatever the dtype, so float64 is held to that
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm y = gain * (x - center(x)) / sigma + bias, or none, or a module whose form is not known.

    kind: "none" (no module: y = x), "rms", "layer", or "module" (only autograd knows). `plus_one`: the gain is 1 +
    weight. Weights are read when they are used, so edits of the model are seen.
    """

    module: nn.Module | None
    kind: Literal["none", "rms", "layer", "module"] = "none"
    plus_one: bool = False
    eps: float = 0.0

    def gain(self, dtype: torch.dtype) -> Tensor | None:
        """[D], or None where it is 1."""
        weight = getattr(self.module, "weight", None)
        if weight is None:
            return None
        return weight.detach().to(dtype) + 1 if self.plus_one else weight.detach().to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias.detach().to(dtype) if self.kind == "layer" and bias is not None else None

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x_hat, 1 / sigma [..., 1]) of the last axis; for kinds "rms" and "layer"."""
        if self.kind == "layer":
            x = x - x.mean(dim=-1, keepdim=True)
        inverse = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x * inverse, inverse

    def fold(self, weight: Tensor) -> Tensor:
        """`weight` [..., D], which reads y, made to read the standardized x: times the gain, without what centring
        removes.
        """
        gain = self.gain(weight.dtype)
        folded = weight if gain is None else weight * gain
        return folded - folded.mean(dim=-1, keepdim=True) if self.kind == "layer" else folded

    def apply(self, x: Tensor) -> Tensor:
        """y of x [..., D] by the known form; for kinds "rms" and "layer"."""
        y, _ = self.standardize(x)
        gain, bias = self.gain(x.dtype), self.bias(x.dtype)
        y = y if gain is None else y * gain
        return y if bias is None else y + bias

    def vjp(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient with respect to x [N, D] of a gradient with respect to y [N, D]."""
        if self.kind == "none":
            return grad
        if self.kind == "module":
            return self._autograd_vjp(grad, x)
        x_hat, inverse = self.standardize(x)
        folded = self.fold(grad)
        along = (folded * x_hat).mean(dim=-1, keepdim=True)
        return (folded - along * x_hat) * inverse

    def _autograd_vjp(self, grad: Tensor, x: Tensor) -> Tensor:
        module = self.module
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            y = module(leaf)  # type: ignore[misc]
        return torch.autograd.grad(y, leaf, grad.to(y.dtype))[0].to(grad.dtype)


def measure_norm(module: nn.Module | None, width: int) -> Norm:
    """Find which form a norm module has by running it on random vectors of that width."""
    if module is None:
        return Norm(None)
    weight = getattr(module, "weight", None)
    reference = weight if isinstance(weight, Tensor) else None
    dtype = reference.dtype if reference is not None else torch.float32
    device = reference.device if reference is not None else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, width, generator=generator, dtype=torch.float64) * 2 + 0.7
    x = torch.cat([x, x * 0.01]).to(device, dtype)  # small vectors tell one epsilon from another
    with torch.no_grad():
        y = module(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return Norm(module, "module")
    tolerance = _TOLERANCE.get(dtype, 1e-2)
    scale = y.double().abs().amax(dim=0).clamp(min=1e-30)  # trained weights may be in the hundreds, or next to nothing
    best, norm = tolerance, Norm(module, "module")
    named = [
        float(getattr(module, name)) for name in ("eps", "variance_epsilon", "norm_eps") if _is_number(module, name)
    ]
    for eps in dict.fromkeys([*named, 1e-5, 1e-6, 1e-12, 1e-8]):  # some modules keep theirs in the code
        for kind in ("rms", "layer"):
            for plus_one in (False, True):
                tried = Norm(module, kind, plus_one, eps)
                error = float(((tried.apply(x.double()) - y.double()).abs() / scale).max())
                if error < best:
                    best, norm = error, tried
    return norm


def _is_number(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), int | float)
