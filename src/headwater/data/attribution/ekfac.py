"""EK-FAC: the curvature of the linear layers, as a diagonal in the eigenbasis of Kronecker factors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.data.attribution.gradients import SequenceGradients


@dataclass
class _Layer:
    """One linear layer: y = W x + b. turned: its weight is stored as [in, out] (GPT-2)."""

    name: str
    turned: bool
    bias: bool
    inside: Tensor  # [in (+ 1), in (+ 1)] sum of x x', then its eigenvectors in columns
    outside: Tensor  # [out, out] of the gradients of y
    curvature: Tensor  # [out, in (+ 1)]


class Ekfac:
    """The Fisher matrix of a causal language model's linear layers (Grosse et al., 2023), as George et al. (2018) have
    it: in each layer's eigenbasis, the mean squared gradient of a sequence whose tokens the model itself drew.

    The layer that makes the logits is left out where its weight is the embedding's.
    """

    def __init__(self, hf: Any, weights: tuple[str, ...] = (), *, vectorized: bool = True) -> None:
        tied = {id(hf.get_input_embeddings().weight)}
        self.hf, self.layers, names = hf, list[_Layer](), list[str]()
        known = set(SequenceGradients(hf, weights).names)
        for name, module in hf.named_modules():
            turned = type(module).__name__ == "Conv1D"
            if not (turned or isinstance(module, torch.nn.Linear)) or id(module.weight) in tied:
                continue
            if f"{name}.weight" not in known:
                continue
            bias = module.bias is not None and f"{name}.bias" in known
            out, into = module.weight.shape[::-1] if turned else module.weight.shape
            exact = torch.promote_types(module.weight.dtype, torch.float32)  # eigenvectors are of no half precision
            sizes = [(into + bias,) * 2, (out,) * 2, (out, into + bias)]
            zeros = [module.weight.detach().new_zeros(size, dtype=exact) for size in sizes]
            self.layers.append(_Layer(name, turned, bias, *zeros))
            names += [f"{name}.weight", f"{name}.bias"] if bias else [f"{name}.weight"]
        if not self.layers:
            raise MethodError("EK-FAC found no linear layer", got=type(hf).__name__, fix="Use another method")
        self._gradients = SequenceGradients(hf, names, vectorized=vectorized)

    def fit(self, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]], *, seed: int) -> None:
        """Two passes over the sequences: the factors, then the curvature along their eigenvectors."""
        draw = torch.Generator().manual_seed(seed)
        with self._gradients.still():
            drawn = [(ids, self._drawn(ids, draw), at) for ids, at in batches()]
            for ids, targets, at in drawn:
                self._add_factors(ids, targets, at)
        for layer in self.layers:
            layer.inside = torch.linalg.eigh(layer.inside)[1]
            layer.outside = torch.linalg.eigh(layer.outside)[1]
        n = 0
        for ids, targets, at in drawn:
            for layer, part in zip(self.layers, self._turned(ids, at, targets), strict=True):
                layer.curvature += part.square().sum(dim=0)
            n += len(ids)
        for layer in self.layers:
            layer.curvature /= max(n, 1)

    def rows(self, ids: Tensor, at: Tensor) -> Tensor:
        """[n, directions]: the sequences' gradients in the eigenbases."""
        return torch.cat([part.flatten(1) for part in self._turned(ids, at, None)], dim=1)

    def divided(self, rows: Tensor, damping: float) -> Tensor:
        """Rows over curvature + damping x the mean curvature of their layer."""
        every = [(one.curvature + damping * one.curvature.mean()).flatten() for one in self.layers]
        return rows / torch.cat(every)

    def _drawn(self, ids: Tensor, draw: torch.Generator) -> Tensor:
        """[n, T - 1]: for each token the next one as the model draws it."""
        with torch.no_grad():
            chances = self.hf(input_ids=ids[:, :-1], use_cache=False).logits.softmax(-1).cpu()
        targets = torch.multinomial(chances.flatten(0, 1), 1, generator=draw).view(ids.shape[0], -1)
        return targets.to(ids.device)

    def _add_factors(self, ids: Tensor, targets: Tensor, at: Tensor) -> None:
        """Add x x' and the outer products of the gradients at y, over all places (tokens that follow included)."""
        seen: dict[str, Tensor] = {}
        made: dict[str, Tensor] = {}
        handles: list[Any] = []

        def keep(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                seen[name], made[name] = inputs[0].detach(), output

            return hook

        for layer in self.layers:
            handles.append(self.hf.get_submodule(layer.name).register_forward_hook(keep(layer.name)))
        try:
            for weight in (trained := [one for one in self.hf.parameters() if not one.requires_grad]):
                weight.requires_grad_(True)
            with torch.enable_grad():
                logits = self.hf(input_ids=ids[:, :-1], use_cache=False).logits
                mask = at[:, 1:].to(logits.dtype)
                each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                loss = (each.view(mask.shape) * mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).sum()
                slopes = torch.autograd.grad(loss, [made[layer.name] for layer in self.layers])
        finally:
            for handle in handles:
                handle.remove()
            for weight in trained:
                weight.requires_grad_(False)
        for layer, slope in zip(self.layers, slopes, strict=True):
            x, y = (part.flatten(0, -2).to(layer.inside.dtype) for part in (seen[layer.name], slope))
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if layer.bias else x
            layer.inside += x.T @ x
            layer.outside += y.T @ y

    def _turned(self, ids: Tensor, at: Tensor, targets: Tensor | None) -> list[Tensor]:
        """[n, out, in (+ 1)] of each layer: the gradients of the sequences, in its eigenbasis."""
        parts = self._gradients.parts(ids, at, "loss", targets=targets)
        out: list[Tensor] = []
        for layer in self.layers:
            weight = parts[f"{layer.name}.weight"]
            weight = weight.transpose(1, 2) if layer.turned else weight
            if layer.bias:
                weight = torch.cat([weight, parts[f"{layer.name}.bias"][:, :, None]], dim=2)
            out.append(layer.outside.T @ weight @ layer.inside)
        return out
