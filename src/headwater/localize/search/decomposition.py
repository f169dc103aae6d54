"""The rules of contextual decomposition (Hsu et al., 2024): how much of every activation comes from one node.

An activation x is split into beta, what is relevant to a source, and gamma = x - beta, the rest. From the source on,
both go through the model by these rules, so that they always sum to what the model computes:

    linear       W beta; the bias is shared out by |W beta| and |W gamma| (or goes to gamma)
    norm         the deviation is that of the whole; its bias is shared out by |beta| and |gamma|
    attention    the pattern is that of the whole; values are linear
    activation   gamma' = f(gamma), beta' = f(beta + gamma) - f(gamma); of gated MLPs f is all between the projections

All sources are decomposed at once: one more row of beta a source.

Shapes: N sources decomposed so far, B prompts, T tokens, D width, H heads, G key/value heads, K width of a head.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.core.anatomy import is_norm, linear_weight
from headwater.core.errors import ModelError
from headwater.localize.engine.hooks import on_output
from headwater.localize.engine.norms import Norm, measure_norm
from headwater.localize.engine.passes import Engine
from headwater.localize.engine.wiring import Layer, Part
from headwater.localize.search.moves import captured

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound, Group
    from headwater.core.run import Run
    from headwater.localize.search.cdt import CdtConfig

_SMALL = 1e-30  # the authors add 1e-8 to the denominators of shares, by which the parts miss the whole
_AT_ONCE = 16_000_000  # floats of one piece of an MLP's neurons
_KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "pattern", "v", "z")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


class Rules:
    """How a relevant part goes through each kind of module of one model."""

    def __init__(self, engine: Engine, config: "CdtConfig") -> None:
        self.engine, self.config, self.work = engine, config, engine.work
        self.name = type(engine.hf).__name__
        for index, layer in enumerate(engine.wiring.layers):
            self._check_layer(index, layer)
        self.final = measure_norm(engine.wiring.final_norm, engine.wiring.d_model)
        self.known_form(self.final, "the last norm")
        if engine.wiring.unembed is None:
            raise ModelError(f"{self.name} cannot be decomposed: its logits come from no single module")

    def known_form(self, norm: Norm, what: str) -> None:
        if norm.kind == "module":
            raise ModelError(
                f"{self.name} cannot be decomposed: {what} has an unknown form",
                got=type(norm.module).__name__,
                wanted="LayerNorm or RMSNorm",
            )

    def _check_layer(self, index: int, layer: Layer) -> None:
        for norm in (layer.norm, layer.mlp_norm, layer.post_norm):
            self.known_form(norm, f"a norm of layer {index}")
        mlp = layer.mlp
        whole = mlp.entry.module
        if mlp.experts is not None or mlp.entry.flat or mlp.down_proj is None or mlp.down_proj is whole:
            why = "a mixture of experts" if mlp.experts is not None else "not one module"
            raise ModelError(f"{self.name} cannot be decomposed: the MLP of layer {index} is {why}", fix="Use eap_ig")
        if all(module is not mlp.down_proj for module in whole.modules()):
            raise ModelError(f"{self.name} cannot be decomposed: the MLP of layer {index} is not one module")

    def bias(self, relevant: Tensor, rest: Tensor, bias: Tensor) -> Tensor:
        """The part of a bias that goes to beta: by size, or none."""
        if self.config.biases == "rest":
            return torch.zeros_like(relevant)
        size = relevant.abs()
        return bias * (size / (size + rest.abs()).clamp(min=_SMALL))

    def linear(self, beta: Tensor, whole: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """beta [N, B, ..., in] of whole [B, ..., in] through weight [out, in]."""
        out = beta @ weight.T
        return out if bias is None else out + self.bias(out, whole @ weight.T - out, bias)

    def norm(self, norm: Norm, beta: Tensor, whole: Tensor) -> Tensor:
        """beta [N, B, T, D] of what a norm reads, as part of what it gives."""
        if norm.kind == "none":
            return beta
        _, inverse = norm.standardize(whole)
        out = (beta - beta.mean(dim=-1, keepdim=True) if norm.kind == "layer" else beta) * inverse
        gain, bias = norm.gain(self.work), norm.bias(self.work)
        out = out if gain is None else out * gain
        return out if bias is None else out + self.bias(beta, whole - beta, bias)

    def project(self, part: Part, beta: Tensor, whole: Tensor) -> Tensor:
        """[N, B, T, heads, K]: beta of each head's query, key or value; beta and whole are after the norm."""
        heads, width = part.rows.shape
        bias = part.bias(self.work)
        bias = None if bias is None else bias.flatten()
        out = self.linear(beta, whole, part.weight(self.work).flatten(0, 1), bias)
        return out.unflatten(-1, (heads, width))

    def merged(self, beta: Tensor, whole: Tensor) -> Tensor:
        """Where beta and gamma have different signs, the larger takes all (if asked for)."""
        if not self.config.merge_signs:
            return beta
        gamma = whole - beta
        larger = torch.where(beta.abs() >= gamma.abs(), whole.expand_as(beta), torch.zeros_like(beta))
        return torch.where(beta * gamma < 0, larger, beta)

    def mlp(self, layer: Layer, beta: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """(beta [N, B, T, D], whole [B, T, D]) of what an MLP module gives, of what it reads."""
        module, dtype = layer.mlp.entry.module, self.engine.model.dtype
        linears = [m for m in module.modules() if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim == 2]
        made: dict[nn.Module, Tensor] = {}
        with ExitStack() as stack:
            for linear in linears:
                on_output(stack, linear, lambda y, linear=linear: made.__setitem__(linear, y.to(self.work)))
            out = module(whole.to(dtype))
        out = (out[0] if isinstance(out, tuple) else out).to(self.work)
        widest = max(y.shape[-1] for y in made.values()) if made else whole.shape[-1]
        size = max(1, _AT_ONCE // (whole.shape[0] * whole.shape[1] * widest))
        found = torch.empty_like(beta)
        for start in range(0, len(beta), size):
            piece = beta[start : start + size]
            with ExitStack() as stack:
                for linear in linears:
                    on_output(stack, linear, self._through(linear, made[linear], len(piece)))
                rest = module((whole - piece).to(dtype).flatten(0, 1))
            rest = (rest[0] if isinstance(rest, tuple) else rest).to(self.work).unflatten(0, piece.shape[:2])
            found[start : start + size] = out - rest
        return found, out

    def _through(self, linear: nn.Module, whole: Tensor, n: int) -> Any:
        """A hook by which a linear module that reads gamma gives gamma with its share of the bias."""
        bias = getattr(linear, "bias", None)
        bias = None if bias is None else bias.detach().to(self.work)

        def give(y: Tensor) -> Tensor | None:
            if self.config.biases == "rest" and not self.config.merge_signs:
                return None
            rest = y.to(self.work).unflatten(0, (n, len(whole)))
            plain = rest if bias is None else rest - bias
            beta = (whole if bias is None else whole - bias) - plain
            beta = beta if bias is None else beta + self.bias(beta, plain, bias)
            rest = whole - self.merged(beta, whole)
            return rest.flatten(0, 1).to(y.dtype)

        return give


# --- what a source is relevant beyond


class Means:
    """Mean of every node's output over prompts, at each distance from the end."""

    def __init__(self, engine: Engine, bound: "Bound") -> None:
        longest = max(group.length for group in bound.groups)
        self.counts = torch.zeros(longest)
        self.sums: dict[str, Tensor] = {}
        for group in bound.groups:
            for part in group.parts(64):
                self.counts[longest - group.length :] += len(part)
                run = captured(engine.model, part.clean, ("z", "mlp_out", "resid_pre"), logits="none")
                for name in _node_sites(engine):
                    values = run[name].to(engine.work).sum(dim=0)
                    held = self.sums.setdefault(name, values.new_zeros(longest, *values.shape[1:]))
                    held[longest - group.length :] += values

    def __getitem__(self, name: str) -> Tensor:
        sums = self.sums[name]
        return sums / self.counts.to(sums).view(-1, *[1] * (sums.ndim - 1))


def _node_sites(engine: Engine) -> Iterator[str]:
    yield "resid_pre.0"
    for index in range(engine.wiring.graph.n_layers):
        yield from (f"z.{index}", f"mlp_out.{index}")


# --- one batch


class Decomposition:
    """Every source's part of everything above it, on one batch of prompts.

    relevance: [N, N + 1] and shares: [N, readers], float64, summed over prompts, as in `CdtResult` (shares not yet
    weighted). whole: [B], the model's own logit difference, before any cap or scale of the logits.
    """

    def __init__(self, rules: Rules, group: "Group", means: Means | None) -> None:
        self.rules, self.engine, self.work = rules, rules.engine, rules.work
        self.graph, self.layers = self.engine.wiring.graph, self.engine.wiring.layers
        sources = len(self.graph.sources)
        self.relevance = torch.zeros(sources, sources + 1, dtype=torch.float64)
        self.shares = torch.zeros(self.graph.allowed.shape, dtype=torch.float64)
        self.run: Run = captured(self.engine.model, group.clean, _KINDS, logits="none")
        self.length = group.length
        corrupt = None
        if rules.config.baseline == "counterfactual":
            corrupt = captured(self.engine.model, group.corrupt, ("z", "mlp_out", "resid_pre"), logits="none")
        self.theirs = corrupt if corrupt is not None else means
        beta = self.change("resid_pre.0")[None]
        self.writes = beta
        for index, layer in enumerate(self.layers):
            beta = self._layer(index, layer, beta)
        self._read_out(group, beta)

    def seen(self, name: str) -> Tensor:
        return self.run[name].to(self.work)

    def change(self, name: str) -> Tensor:
        """What a node gives beyond its baseline."""
        ours = self.seen(name)
        if self.theirs is None:
            return ours
        theirs = self.theirs[name].to(self.work)
        return ours - (theirs if theirs.ndim == ours.ndim else theirs[len(theirs) - self.length :])

    def _layer(self, index: int, layer: Layer, beta: Tensor) -> Tensor:
        graph, rules = self.graph, self.rules
        before, n = self.seen(f"resid_pre.{index}"), len(beta)
        read, whole = rules.norm(layer.norm, beta, before), _normed(layer.norm, before)
        self._read(index, layer, before, whole)
        attention = self._attention(index, layer, read, whole)
        heads = self._head_writes(index, layer)
        middle = before + self.seen(f"attn_out.{index}")
        if graph.parallel:
            at_mlp, beta_mlp, reading = before, beta, self.writes
        else:
            beta = torch.cat([beta + attention, heads])
            self.writes = torch.cat([self.writes, heads])
            at_mlp, beta_mlp, reading = middle, beta, self.writes
        into, entering = rules.norm(layer.mlp_norm, beta_mlp, at_mlp), _normed(layer.mlp_norm, at_mlp)
        direct = rules.norm(layer.mlp_norm, reading, at_mlp)
        self.shares[: len(direct), graph.mlp_reader_at(index)] = _share(direct, entering, (2, 3)).sum(dim=1)
        mlp = self._mlp(index, layer, into, entering)
        at = graph.mlp_at(index)
        self.relevance[: len(mlp), at] = _share(mlp, self.seen(f"mlp_out.{index}"), (2, 3)).sum(dim=1)
        own = self.change(f"mlp_out.{index}")[None]
        if graph.parallel:
            beta = torch.cat([beta + attention + mlp, heads, own])
            self.writes = torch.cat([self.writes, heads, own])
        else:
            beta = torch.cat([beta + mlp, own])
            self.writes = torch.cat([self.writes, own])
        after = self.seen(f"resid_post.{index}")
        merged = rules.merged(beta[:n], after)
        return beta if merged is beta[:n] else torch.cat([merged, beta[n:]])

    def _read(self, index: int, layer: Layer, before: Tensor, whole: Tensor) -> None:
        """Shares of what this layer's queries, keys and values read that come directly from each source."""
        direct, first = self.rules.norm(layer.norm, self.writes, before), self.graph.attention_readers_at(index).start
        for name in ("q", "k", "v"):
            part = layer.parts[name]
            mine, all_of_it = self.rules.project(part, direct, whole), _projected(part, whole, self.work)
            found = _share(mine, all_of_it, (2, 4)).sum(dim=1)
            self.shares[: len(found), first : first + found.shape[1]] = found
            first += found.shape[1]

    def _attention(self, index: int, layer: Layer, read: Tensor, whole: Tensor) -> Tensor:
        """[N, B, T, D]: beta of what attention adds; also each head's relevance to the sources so far."""
        rules, part = self.rules, layer.parts["v"]
        pattern = self.seen(f"pattern.{index}")
        groups = layer.attention.n_heads // layer.attention.n_kv_heads
        _same(rules.name, index, "values", _projected(part, whole, self.work), self.seen(f"v.{index}"), self.run)
        values = rules.project(part, read, whole).repeat_interleave(groups, dim=3)
        beta = torch.einsum("bhts,nbshk->nbthk", pattern, values)
        # of the pattern as it was seen: some models softmax in float32 only where they show it
        mixed = torch.einsum("bhts,bshk->bthk", pattern, self.seen(f"v.{index}").repeat_interleave(groups, dim=2))
        _same(rules.name, index, "mixed values", mixed, self.seen(f"z.{index}"), self.run)
        self.relevance[: len(beta), self.graph.heads_at(index)] = _share(beta, mixed, (2, 4)).sum(dim=1)
        weight, bias = linear_weight(layer.attention.out_proj), getattr(layer.attention.out_proj, "bias", None)
        weight, bias = weight.detach().to(self.work), None if bias is None else bias.detach().to(self.work)
        out = rules.linear(beta.flatten(3), mixed.flatten(2), weight, bias)
        gives = mixed.flatten(2) @ weight.T
        gives = gives if bias is None else gives + bias
        return rules.norm(layer.post_norm, out, gives) * layer.attention.write.scale

    def _head_writes(self, index: int, layer: Layer) -> Tensor:
        """[H, B, T, D]: what each head of this layer adds beyond its baseline; a norm after it divides by the whole."""
        change = self.change(f"z.{index}")
        weight = layer.attention.out_weight_HKD().detach().to(self.work)
        if layer.post_norm.module is not None:
            bias = getattr(layer.attention.out_proj, "bias", None)
            gives = torch.einsum("bthk,hkd->btd", self.seen(f"z.{index}"), weight)
            gives = gives if bias is None else gives + bias.detach().to(self.work)
            change = change * layer.post_norm.standardize(gives)[1][..., None]
            weight = layer.post_norm.fold(weight)
        return torch.einsum("bthk,hkd->hbtd", change, weight) * layer.attention.write.scale

    def _mlp(self, index: int, layer: Layer, into: Tensor, entering: Tensor) -> Tensor:
        rules, write = self.rules, layer.mlp.write
        found, out = rules.mlp(layer, into, entering)
        added = out
        if is_norm(write.port.module):
            after = measure_norm(write.port.module, self.engine.wiring.d_model)
            rules.known_form(after, f"the norm after the MLP of layer {index}")
            found, added = rules.norm(after, found, out), after.apply(out)
        _same(rules.name, index, "MLP's output", added * write.scale, self.seen(f"mlp_out.{index}"), self.run)
        return found * write.scale

    def _read_out(self, group: "Group", beta: Tensor) -> None:
        """Relevance of every source to the logit difference at the last token."""
        rules, unembed = self.rules, self.engine.wiring.unembed
        assert unembed is not None
        final = self.seen(f"resid_post.{len(self.layers) - 1}")[:, -1:]
        device = final.device
        weight, bias = linear_weight(unembed).detach(), getattr(unembed, "bias", None)
        whole = _normed(rules.final, final)[:, 0]

        def difference(parts: Tensor | None) -> Tensor:
            """Answers' mean logit minus foils', [N, B] of parts [N, B, D]; [B] of the whole."""
            means = []
            for tokens in (group.answers.to(device), group.foils.to(device)):
                there, ids = tokens >= 0, tokens.clamp(min=0)
                rows = weight[ids].to(self.work)  # [B, A, D]
                logits = torch.einsum("bad,bd->ba", rows, whole)
                shift = None if bias is None else bias.detach()[ids].to(self.work)
                if parts is None:
                    logits = logits if shift is None else logits + shift
                else:
                    own = torch.einsum("bad,nbd->nba", rows, parts)
                    logits = own if shift is None else own + rules.bias(own, logits - own, shift)
                means.append((logits * there).sum(dim=-1) / there.sum(dim=-1))
            return means[0] - means[1]

        self.whole = difference(None).double().cpu()
        total = rules.norm(rules.final, beta[:, :, -1:], final)[:, :, 0]
        direct = rules.norm(rules.final, self.writes[:, :, -1:], final)[:, :, 0]
        self.relevance[:, -1] = difference(total).double().sum(dim=1).cpu()
        self.shares[:, -1] = difference(direct).double().sum(dim=1).cpu()
        self.beta = beta


def _normed(norm: Norm, x: Tensor) -> Tensor:
    return x if norm.kind == "none" else norm.apply(x)


def _projected(part: Part, x: Tensor, work: torch.dtype) -> Tensor:
    """[B, T, heads, K]."""
    out = torch.einsum("btd,hkd->bthk", x, part.weight(work))
    bias = part.bias(work)
    return out if bias is None else out + bias


def _share(beta: Tensor, whole: Tensor, over: tuple[int, ...]) -> Tensor:
    """|beta| / (|beta| + |gamma|), each summed over these axes; float64. whole lacks the first axis of beta."""
    ours, rest = beta.abs().sum(dim=over), (whole - beta).abs().sum(dim=over)
    return (ours / (ours + rest).clamp(min=_SMALL)).double().cpu()


def _same(name: str, index: int, what: str, ours: Tensor, theirs: Tensor, run: "Run") -> None:
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-9))
    if not error <= _TOLERANCE.get(run[f"z.{index}"].dtype, 0.1):
        raise ModelError(
            f"{name} cannot be decomposed: the {what} of layer {index} are not what its modules give",
            got=f"relative difference {error:.2g}",
            fix="Use eap_ig",
        )
