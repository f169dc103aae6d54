"""The known circuit, tested by force: every edge, and every node, carries its counterfactual value once.

Written from the definition and for the compiled models' architecture only, so that it owes nothing to the methods that
are scored against it: each reader reads, from each source, what that source writes now or what it wrote on the
counterfactual.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.behavior.table import Behavior
from headwater.core.errors import ModelError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.graph import Graph

if TYPE_CHECKING:
    from headwater.bench.mechanism import TrueMechanism
    from headwater.core.model import Model

_FLOATS = 8_000_000  # held at once


@register_result
class Interchange(Result):
    """What interchanging one edge, or all that a node writes, does to the answer at the last position.

    `tables["edges"]`: source, target, live (in the known circuit), changed (share of pairs whose likeliest token
    changes), effect (largest change of a log-probability over pairs and tokens, nats). `tables["nodes"]`: node, live,
    changed, effect. facts: n, outside (largest effect outside the circuit: 0 where it is the whole truth), needed
    (share of the circuit's edges whose interchange changes an answer on these pairs).
    """

    kind: ClassVar[str] = "interchange"
    main: ClassVar[str] = "edges"


def interchange(model: "Model", mechanism: "TrueMechanism", behavior: Behavior) -> Interchange:
    """Interchange every edge and every node of the graph on every pair (Geiger et al., 2021), and compare with the
    known circuit.

    An edge may be in the circuit and change nothing on these pairs: a second path may carry the same, or the pairs may
    not differ in its variable. An edge outside it never changes anything in a compiled model.

    Raises ModelError for a model of another architecture.
    """
    graph = mechanism.graph
    edges = graph.allowed.nonzero()
    one_out = [(s, r) for s, r in edges.tolist()]
    masks = graph.allowed.repeat(len(one_out), 1, 1)
    for index, (source, reader) in enumerate(one_out):
        masks[index, source, reader] = False
    whole = graph.allowed.repeat(len(graph.sources), 1, 1)
    for source in range(len(graph.sources)):
        whole[source, source] = False
    found = [_effects(model, graph, behavior, masks), _effects(model, graph, behavior, whole)]
    (changed, effect), (node_changed, node_effect) = found
    live = mechanism.tensors["mask"]
    edge_table = pl.DataFrame(
        {
            "source": [graph.sources[s] for s, _ in one_out],
            "target": [graph.readers[r] for _, r in one_out],
            "live": [bool(live[s, r]) for s, r in one_out],
            "changed": changed.tolist(),
            "effect": effect.tolist(),
        }
    )
    alive = set(mechanism.live_nodes)
    nodes = pl.DataFrame(
        {
            "node": list(graph.sources),
            "live": [name in alive for name in graph.sources],
            "changed": node_changed.tolist(),
            "effect": node_effect.tolist(),
        }
    )
    inside, outside = edge_table.filter(pl.col("live")), edge_table.filter(~pl.col("live"))
    largest = [part["effect"].max() for part in (outside, nodes.filter(~pl.col("live"))) if part.height]
    facts = {
        "n": behavior.n,
        "program": mechanism.facts["program"],
        "outside": max((float(x) for x in largest), default=0.0),  # type: ignore[arg-type]
        "needed": float((inside["changed"] > 0).mean()) if inside.height else 1.0,  # type: ignore[arg-type]
    }
    return Interchange(
        tables={"edges": edge_table, "nodes": nodes}, facts=facts, provenance=Provenance.collect(model, behavior)
    )


def _effects(model: "Model", graph: Graph, behavior: Behavior, masks: Tensor) -> tuple[Tensor, Tensor]:
    """([masks] share of pairs whose answer changes, [masks] largest change of a log-probability)."""
    bound = behavior.bind(model)
    changed = torch.zeros(len(masks), dtype=torch.float64)
    effect = torch.zeros(len(masks), dtype=torch.float64)
    for group in bound.groups:
        run = PlainRun(model.hf, graph, group.clean, group.corrupt)
        wide = len(group) * group.length * graph.d_model * 2 * len(graph.sources)
        size = max(1, _FLOATS // wide)
        for start in track(range(0, len(masks), size), "interchange"):
            some = slice(start, start + size)
            logits = run.logits(masks[some])
            effect[some] = torch.maximum(
                effect[some], (logits.log_softmax(-1) - run.clean.log_softmax(-1)).abs().flatten(1).amax(1).double()
            )
            changed[some] += (logits.argmax(-1) != run.clean.argmax(-1)).double().sum(dim=1)
    return changed / bound.n, effect


class PlainRun:
    """Pairs of one length through a plain transformer, with what each reader reads from each source in our hands.

    clean: [B, V], logits at the last position of the prompts.
    """

    def __init__(self, hf: Any, graph: Graph, clean: Tensor, corrupt: Tensor) -> None:
        from headwater.bench.plain import PlainForCausalLM

        if not isinstance(hf, PlainForCausalLM):
            raise ModelError(
                "interchange by force knows one architecture", got=type(hf).__name__, wanted="PlainForCausalLM"
            )
        self.hf: Any = hf
        self.graph, self.ids = graph, clean
        everything = graph.allowed[None]
        with torch.no_grad():
            nothing = torch.zeros(len(graph.sources), *self._embed(corrupt).shape)
            _, self.corrupt = self._run(everything, corrupt, nothing)
            self.corrupt = self.corrupt[:, 0]
            self.clean = self._run(everything, clean, self.corrupt)[0][0]

    def logits(self, masks: Tensor) -> Tensor:
        """[masks, B, V] at the last position: edges in the mask [sources, readers] carry what is written now."""
        with torch.no_grad():
            return self._run(masks, self.ids, self.corrupt)[0]

    def _embed(self, ids: Tensor) -> Tensor:
        return self.hf.embed_tokens(ids) + self.hf.embed_positions.weight[: ids.shape[1]]

    def _run(self, masks: Tensor, ids: Tensor, corrupt: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [E, B, V] at the last position, writes [sources, E, B, T, D]). Biases belong to no source."""
        hf, graph = self.hf, self.graph
        heads, cut = graph.n_heads, graph.allowed & ~masks
        x = self._embed(ids)
        writes = torch.zeros(len(graph.sources), len(masks), *x.shape)
        writes[0] = x
        constant = torch.zeros(x.shape[-1])

        def whole(before: int) -> Tensor:
            """The stream where every edge carries what is written now, [E, B, T, D]."""
            return writes[:before].sum(dim=0) + constant

        def other(stream: Tensor, readers: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Readers with an edge cut: (mask, reader) indices [N], and what they read, [N, B, T, D]."""
            at, source, reader = cut[:, :, readers].nonzero().unbind(dim=1)
            pairs, group = torch.stack([at, reader], dim=1).unique(dim=0, return_inverse=True)
            less = torch.zeros(len(pairs), *x.shape).index_add_(0, group, writes[source, at] - corrupt[source])
            return pairs[:, 0], pairs[:, 1], stream[pairs[:, 0]] - less

        for index, block in enumerate(hf.layers):
            stream = whole(graph.sources_before(index))
            first = graph.attention_readers_at(index).start
            parts = []
            for number, module in enumerate((block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)):
                made = module(stream).unflatten(-1, (heads, -1)).movedim(-2, 1)  # [E, heads, B, T, K]
                at, head, reads = other(stream, slice(first + number * heads, first + (number + 1) * heads))
                weight, bias = module.weight.view(heads, -1, x.shape[-1]), module.bias.view(heads, 1, 1, -1)
                made[at, head] = torch.einsum("nbtd,nkd->nbtk", reads, weight[head]) + bias[head]
                parts.append(made)
            q, k, v = parts
            scores = q @ k.transpose(-1, -2)
            if hf.config.is_causal:
                ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(ahead, -torch.inf)
            z = scores.softmax(dim=-1) @ v
            out = block.attn.o_proj.weight.view(x.shape[-1], heads, -1)
            writes[graph.heads_at(index)] = torch.einsum("ehbtk,dhk->hebtd", z, out)
            constant = constant + block.attn.o_proj.bias
            stream = whole(graph.sources_before(index, mlp=True))
            mlp = graph.mlp_reader_at(index)
            at, _, reads = other(stream, slice(mlp, mlp + 1))
            stream[at] = reads
            writes[graph.mlp_at(index)] = torch.relu(block.mlp.up_proj(stream)) @ block.mlp.down_proj.weight.T
            constant = constant + block.mlp.down_proj.bias
        stream = whole(len(graph.sources))
        at, _, reads = other(stream, slice(len(graph.readers) - 1, len(graph.readers)))
        stream[at] = reads
        return hf.lm_head(stream[:, :, -1]), writes
