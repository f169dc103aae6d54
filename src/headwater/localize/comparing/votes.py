"""Votes: what each component alone says about the candidates, read from its own write at the last position.

A write is read by the final norm (with the whole stream's deviation) and the unembedding. Votes add up: over all
components, and what biases add, they are the model's own logits (before a soft cap or a scale, where a model has one).

Shapes: B pairs, n pairs in all, C components, K candidates of a pair, M neurons of a layer, D width of the stream.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.anatomy import linear_weight
from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.localize.engine.edges import head_values
from headwater.localize.engine.hooks import on_port
from headwater.localize.engine.norms import Norm, measure_norm
from headwater.localize.engine.passes import Batch, Engine, Seen


@dataclass(eq=False)
class Votes:
    """margins [C, n]: votes for the answers (mean) less that for the model's favourite foil; right [C, n] bool: whether
    the candidate a component raises most is an answer; said [C, n]: that candidate's token; total [n]: the model's own
    margin; chance [n]; answers [n]: the first answer's token. Neurons stand behind the components.
    """

    margins: Tensor
    right: Tensor
    said: Tensor
    total: Tensor
    chance: Tensor
    answers: Tensor
    neurons: list[tuple[int, int]]


class Voter:
    """Reads the votes of every component from one forward a batch."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.graph = engine, engine.wiring.graph
        self.kept: dict[int, Tensor] = {}
        unembed = engine.wiring.unembed
        if not isinstance(unembed, nn.Linear):
            raise MethodError(
                "votes need a linear unembedding", got=type(unembed).__name__, fix="Patch components instead"
            )
        self.unembed = unembed
        final = engine.wiring.final_norm
        self.norm: Norm = measure_norm(final, engine.wiring.d_model)
        if self.norm.kind == "module":
            raise MethodError("votes need a final norm of a known form", got=type(final).__name__)
        self.components = list(self.graph.sources)
        self.scalable = [name for name in self.components if name != "input"]

    def writes(self, seen: Seen) -> Tensor:
        """[C, B, D] float64: what each source writes at the last position."""
        engine = self.engine
        assert seen.embed is not None
        batch = seen.embed.shape[0]
        rows = [seen.embed[:, -1].double()[None]]
        for index, layer in enumerate(engine.wiring.layers):
            weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach().double())
            weight = weight * layer.attention.write.scale
            values = head_values(layer, seen, index, torch.float64)
            values = values.reshape(values.shape[0], batch, -1, values.shape[-1])[:, :, -1]
            rows.append(torch.bmm(values, weight))
            mlp = seen.mlp_out[index].double().reshape(batch, -1, seen.embed.shape[-1])[:, -1]
            rows.append(mlp[None] * layer.mlp.write.scale)
        return torch.cat(rows)

    def read(self, seen: Seen, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(directions [B, K, D] that a write is dotted with to give its vote, whole votes [B, K], finals [B, D])."""
        assert seen.final is not None
        final = seen.final[:, -1].double()
        weight = self.unembed.weight.detach().double()[tokens.clamp(min=0)]
        if self.norm.kind == "none":
            whole = (final[:, None] * weight).sum(dim=-1)
            directions = weight
        else:
            _, inverse = self.norm.standardize(final)
            directions = self.norm.fold(weight) * inverse[:, None]
            whole = (self.norm.apply(final)[:, None] * weight).sum(dim=-1)
        if self.unembed.bias is not None:
            whole = whole + self.unembed.bias.detach().double()[tokens.clamp(min=0)]
        return directions, whole, final

    def batch(self, batch: Batch) -> tuple[Seen, Tensor, Tensor, Tensor]:
        """(what was seen, directions [B, K, D], whole votes [B, K], candidate tokens [B, K]; -1 where a pair has fewer)
        of the prompts of a batch; answers come first."""
        with self.engine.open():
            kept: dict[int, Tensor] = {}
            with ExitStack() as stack:
                for index, layer in enumerate(self.engine.wiring.layers):
                    port = layer.mlp.neurons
                    if port is not None and layer.mlp.down_proj is not None:
                        on_port(stack, port, lambda x, index=index: kept.__setitem__(index, x.detach()))
                seen = self.engine.run(batch.clean, None)
        self.kept = kept
        tokens = torch.cat([batch.answers, batch.foils], dim=1).to(seen.logits.device)  # type: ignore[union-attr]
        directions, whole, _ = self.read(seen, tokens)
        return seen, directions, whole, tokens


def collect(voter: Voter, batches: Sequence[Batch], label: str, *, neurons: int = 0) -> Votes:
    parts: list[dict[str, Tensor]] = []
    rows: list[int] = []
    strongest = _strongest_neurons(voter, batches, neurons) if neurons else []
    for batch in track(batches, label):
        if batch.foils.shape[1] == 0 or bool((batch.foils < 0).all(dim=1).any()):
            raise MethodError("votes need foils to be for or against", got="pairs without foils")
        seen, directions, whole, tokens = voter.batch(batch)
        votes = torch.einsum("cbd,bkd->cbk", voter.writes(seen), directions)
        if strongest:
            votes = torch.cat([votes, _neuron_votes(voter, strongest, directions)])
        there = tokens >= 0
        is_answer = torch.zeros_like(there)
        is_answer[:, : batch.answers.shape[1]] = True
        ours, theirs = there & is_answer, there & ~is_answer
        # the foil that the model likes best is what the answer has to beat
        rival = whole.masked_fill(~theirs, -torch.inf).argmax(dim=1)
        at = torch.arange(len(rival))
        mean = (votes * ours).sum(dim=2) / ours.sum(dim=1)
        total = (whole * ours).sum(dim=1) / ours.sum(dim=1) - whole[at, rival]
        best = votes.masked_fill(~there, -torch.inf).argmax(dim=2)
        parts.append(
            {
                "margins": mean - votes[:, at, rival], "right": ours[at, best], "said": tokens[at, best],
                "total": total, "chance": ours.sum(dim=1) / there.sum(dim=1), "answers": batch.answers[:, 0],
            }
        )  # fmt: skip
        rows += batch.rows
    order = sorted(range(len(rows)), key=rows.__getitem__)
    joined = {name: torch.cat([part[name].cpu() for part in parts], dim=-1)[..., order] for name in parts[0]}
    return Votes(**joined, neurons=strongest)


def _strongest_neurons(voter: Voter, batches: Sequence[Batch], n: int) -> list[tuple[int, int]]:
    """(layer, neuron) of the `n` neurons of the largest mean |vote for the answers less that for the foils|."""
    total: dict[int, Tensor] = {}
    for batch in track(batches, "neurons"):
        _seen, directions, _whole, tokens = voter.batch(batch)
        answers = batch.answers.shape[1]
        ours, theirs = tokens[:, :answers] >= 0, tokens[:, answers:] >= 0
        for_, against = directions[:, :answers] * ours[..., None], directions[:, answers:] * theirs[..., None]
        along = for_.sum(dim=1) / ours.sum(dim=1)[:, None] - against.sum(dim=1) / theirs.sum(dim=1)[:, None]
        for layer in range(voter.graph.n_layers):
            weight, values = _neuron_weight(voter, layer), _last(voter.kept[layer], len(batch))
            size = (values * (along @ weight)).abs().sum(dim=0)
            total[layer] = total.get(layer, torch.zeros_like(size)) + size
    width = len(total[0])
    flat = torch.cat([total[layer] for layer in range(voter.graph.n_layers)])
    return [divmod(at, width) for at in flat.topk(min(n, len(flat))).indices.tolist()]


def _neuron_weight(voter: Voter, index: int) -> Tensor:
    """[D, M]: what a neuron of 1 adds to the stream."""
    layer = voter.engine.wiring.layers[index]
    if layer.mlp.down_proj is None or index not in voter.kept:
        raise MethodError(f"layer {index} has no neurons with a write of their own", fix="Leave neurons=0")
    if layer.mlp.write.port.module not in (layer.mlp.down_proj, _module_of(layer.mlp.down_proj, layer)):
        raise MethodError(
            f"neurons of layer {index} have no write of their own: a norm follows the MLP", fix="Leave neurons=0"
        )
    return linear_weight(layer.mlp.down_proj).detach().double() * layer.mlp.write.scale


def _module_of(down: nn.Module, layer: Any) -> nn.Module | None:
    """The MLP module whose output is the down-projection's."""
    module = layer.mlp.write.port.module
    return module if any(child is down for child in module.modules()) else None


def _neuron_votes(voter: Voter, which: Sequence[tuple[int, int]], directions: Tensor) -> Tensor:
    """[neurons, B, K]."""
    rows = []
    for layer, neuron in which:
        write = _neuron_weight(voter, layer)[:, neuron]
        value = _last(voter.kept[layer], directions.shape[0])[:, neuron]
        rows.append(value[:, None] * (directions @ write))
    return torch.stack(rows)


def _last(x: Tensor, batch: int) -> Tensor:
    """[B, M] float64 at the last position of a [B, T, M] or [B * T, M] tensor."""
    return x.double().reshape(batch, -1, x.shape[-1])[:, -1]
