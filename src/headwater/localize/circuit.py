"""Circuit: a weighted subgraph of a model, that says how faithful it is only beside what it must beat."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.graph import Graph, head_of
from headwater.localize.judging import mib
from headwater.localize.selection import Rank, nodes_in, prune, select

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model
    from headwater.localize.engine.ablation import AblationLike
    from headwater.localize.judging.completeness import IncompletenessResult
    from headwater.localize.judging.faithfulness import FaithfulnessResult, MinimalityResult, NullResult


@register_result
class Circuit(Result):
    """Edges of a `Graph`, with the scores they were chosen by.

    `tables["edges"]`: source, target, score; `tables["nodes"]`: node; `tensors["mask"]` [sources, readers] bool and,
    where known, `tensors["scores"]` of *all* edges, so that other sizes can be cut from the same ranking. A circuit by
    position also has facts `positions` and `tensors["position_mask"]` [sources, readers, P]; its mask is then every
    edge that it has at some position, and `tables["positions"]` has a row (source, target, position) for each of them.
    """

    kind: ClassVar[str] = "circuit"
    main: ClassVar[str] = "edges"
    _model: "Model | None" = None

    @classmethod
    def build(
        cls,
        graph: Graph,
        mask: Tensor,
        scores: Tensor | None = None,
        *,
        positions: Sequence[str] | None = None,
        model: "Model | None" = None,
        method: str = "given",
        config: dict[str, Any] | None = None,
        provenance: Provenance | None = None,
    ) -> Self:
        """A circuit of the edges in `mask` [sources, readers]. Edges that the graph does not have are refused.

        positions: with a mask [sources, readers, P], what the P classes are: names of positions of the behavior and
        `other`, or positions counted from the end (`-1`).
        """
        mask = mask.bool().cpu()
        at_positions = None
        if positions is not None:
            if mask.ndim != 3 or mask.shape[-1] != len(positions) or len(set(positions)) != len(positions):
                raise MethodError("a mask by position needs a name for each", got=f"{list(mask.shape)}: {positions}")
            at_positions, mask = mask, mask.any(dim=-1)
        if mask.shape != graph.allowed.shape or bool((mask & ~graph.allowed).any()):
            raise MethodError(
                "a circuit has edges that its graph has not", got=list(mask.shape), wanted=graph.to_dict()
            )
        at = mask.nonzero()
        weights = torch.ones(len(at), dtype=torch.float64) if scores is None else scores.double().cpu()[mask]
        kept = nodes_in(graph, mask) | mask.any(dim=1)
        names = [name for name, keep in zip(graph.sources, kept.tolist(), strict=True) if keep]
        tables = {
            "edges": pl.DataFrame(
                {
                    "source": [graph.sources[s] for s in at[:, 0].tolist()],
                    "target": [graph.readers[r] for r in at[:, 1].tolist()],
                    "score": weights.tolist(),
                },
                schema={"source": pl.String, "target": pl.String, "score": pl.Float64},
            ),
            "nodes": pl.DataFrame({"node": [*names, "logits"]}, schema={"node": pl.String}),
        }
        facts = {
            "n_edges": len(at),
            "n_total_edges": graph.n_edges,
            "n_nodes": len(names) + 1,
            "method": method,
            "graph": graph.to_dict(),
        }
        tensors = {"mask": mask} if scores is None else {"mask": mask, "scores": scores.double().cpu()}
        if at_positions is not None and positions is not None:
            tensors["position_mask"] = at_positions
            facts |= {"positions": list(positions), "n_position_edges": int(at_positions.sum())}
            tables["positions"] = pl.DataFrame(
                [(graph.sources[s], graph.readers[r], positions[p]) for s, r, p in at_positions.nonzero().tolist()],
                schema={"source": pl.String, "target": pl.String, "position": pl.String},
                orient="row",
            )
        circuit = cls(tables=tables, tensors=tensors, facts=facts, config=config, provenance=provenance)
        circuit._model = model
        return circuit

    @classmethod
    def from_edges(cls, graph: Graph, edges: Iterable[str], *, model: "Model | None" = None) -> Self:
        """A circuit of edges written `a3.h1->a5.h0<q>`."""
        mask = torch.zeros_like(graph.allowed)
        for name in edges:
            mask[graph.edge(name)] = True
        return cls.build(graph, mask, model=model)

    @classmethod
    def from_nodes(cls, graph: Graph, nodes: Iterable[str], *, model: "Model | None" = None) -> Self:
        """All edges among the given nodes (`logits` always counts among them; `input` only if named)."""
        kept = torch.zeros(len(graph.sources), dtype=torch.bool)
        for name in nodes:
            if name != "logits":
                kept[graph.source(name)] = True
        read = (kept.float() @ graph.owners.float()) > 0
        read[-1] = True
        return cls.build(graph, graph.allowed & kept[:, None] & read[None, :], model=model)

    # --- what it holds

    @property
    def graph(self) -> Graph:
        return Graph(**self.facts["graph"])

    @property
    def mask(self) -> Tensor:
        """[sources, readers] bool."""
        return self.tensors["mask"]

    @property
    def scores(self) -> Tensor | None:
        return self.tensors.get("scores")

    @property
    def positions(self) -> list[str] | None:
        """The classes of positions of a circuit by position; None where edges count at all positions."""
        return self.facts.get("positions")

    @property
    def position_mask(self) -> Tensor:
        """[sources, readers, P] bool. Raises MethodError for a circuit whose edges count at all positions."""
        if "position_mask" not in self.tensors:
            raise MethodError("this circuit has its edges at all positions", fix="Cut one with positions=True")
        return self.tensors["position_mask"]

    @property
    def n_edges(self) -> int:
        return int(self.facts["n_edges"])

    @property
    def nodes(self) -> list[str]:
        return self.tables["nodes"]["node"].to_list()

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads in it."""
        return [head for head in map(head_of, self.nodes) if head is not None]

    @property
    def model(self) -> "Model":
        """The model it was found in. Raises MethodError when it was loaded from files and not yet bound to one."""
        if self._model is None:
            raise MethodError("this circuit holds no model to run", fix="Call circuit.bind(model) first")
        return self._model

    def bind(self, model: "Model") -> Self:
        """Say which model it is evaluated in; returns itself. Raises MethodError when the graph is not the model's."""
        from headwater.localize.engine.wiring import graph_of

        if graph_of(model).to_dict() | {"d_model": 0} != self.graph.to_dict() | {"d_model": 0}:
            raise MethodError("this circuit is of another model", got=self.graph, wanted=graph_of(model))
        self._model = model
        return self

    def complement(self) -> "Circuit":
        """Every edge that it lacks. Raises MethodError for a circuit by position."""
        self._at_all_positions("complement")
        return Circuit.build(
            self.graph, self.graph.allowed & ~self.mask, self.scores, model=self._model, method="complement"
        )

    def without(self, *nodes: str) -> "Circuit":
        """The circuit without these nodes, and without what only they connected (which has no effect any more).

        Raises MethodError for a circuit by position.
        """
        self._at_all_positions("without")
        graph = self.graph
        gone = torch.zeros(len(graph.sources), dtype=torch.bool)
        for name in nodes:
            gone[graph.source(name)] = True
        mask = prune(graph, self.mask & ~gone[:, None])
        return Circuit.build(graph, mask, self.scores, model=self._model, method=str(self.facts["method"]))

    def resized(
        self, *, edges: int | None = None, fraction: float | None = None, rank: Rank = "abs", how: Any = "topn"
    ) -> "Circuit":
        """Another size from the same ranking. Raises MethodError when the scores of all edges are not known."""
        scores = self._ranking()
        mask = select(self.graph, scores, edges=edges, fraction=fraction, rank=rank, how=how)
        return Circuit.build(self.graph, mask, scores, model=self._model, method=str(self.facts["method"]))

    def _at_all_positions(self, what: str) -> None:
        if self.positions is not None:
            raise MethodError(f"{what} takes edges that count at all positions", got="a circuit by position")

    def _ranking(self) -> Tensor:
        if self.scores is None:
            raise MethodError(
                "this circuit carries no scores of the edges outside it", fix="Cut it from scores.circuit"
            )
        return self.scores

    # --- how good it is (the arithmetic is in `faithfulness.py`)

    def measure(
        self,
        behavior: "Behavior",
        *,
        metric: str = "logit_diff",
        ablation: "AblationLike" = "counterfactual",
        model: "Model | None" = None,
    ) -> Tensor:
        """The metric of the circuit alone, pair by pair [n], float64, in the order of the behavior's bound frame.

        Cheaper than `faithfulness`, which also needs the model itself: nothing is run but the counterfactual and the
        circuit.
        """
        from headwater.localize.judging.faithfulness import measure

        return measure(self, behavior, metric, ablation, model)

    def faithfulness(
        self,
        behavior: "Behavior",
        *,
        metric: str = "logit_diff",
        ablation: "AblationLike" = "counterfactual",
        model: "Model | None" = None,
    ) -> "FaithfulnessResult":
        """(m(circuit) - m(empty)) / (m(clean) - m(empty)), a ratio of means with a bootstrap interval over pairs.

        ablation: what every edge outside the circuit carries: "counterfactual", "zero", "mean", "mean_positional",
        "resample", "optimal" or an `Ablation`; several at once give a row each, since a circuit's score depends on it.
        The empty circuit has every edge ablated (with "counterfactual" it is the model on the counterfactual). 1: as
        the model; 0: as where all is ablated.
        """
        from headwater.localize.judging.faithfulness import judge

        return judge("faithfulness", self, behavior, metric, ablation, model)

    def completeness(
        self,
        behavior: "Behavior",
        *,
        metric: str = "logit_diff",
        ablation: "AblationLike" = "counterfactual",
        model: "Model | None" = None,
    ) -> "FaithfulnessResult":
        """Faithfulness of everything but the circuit: 0 where the circuit is all there is. See also
        `incompleteness`.
        """
        from headwater.localize.judging.faithfulness import judge

        return judge("completeness", self, behavior, metric, ablation, model)

    def incompleteness(
        self,
        behavior: "Behavior",
        *,
        n: int = 20,
        greedy: int = 3,
        metric: str = "logit_diff",
        ablation: "AblationLike" = "counterfactual",
        seed: int = 0,
        model: "Model | None" = None,
    ) -> "IncompletenessResult":
        """|F(C without K) - F(M without K)| over random and greedily chosen subsets K of the circuit's nodes.

        Completeness as Wang et al. (2022) define it, as a share of the model's effect: 0 where the circuit and the
        model suffer alike from losing the same nodes.
        """
        from headwater.localize.judging.completeness import incompleteness

        return incompleteness(
            self, behavior, n=n, greedy=greedy, metric=metric, ablation=ablation, seed=seed, model=model
        )

    def minimality(
        self,
        behavior: "Behavior",
        *,
        metric: str = "logit_diff",
        nodes: Iterable[str] | None = None,
        ablation: "AblationLike" = "counterfactual",
        model: "Model | None" = None,
    ) -> "MinimalityResult":
        """For each node: how far faithfulness falls when the circuit does without it (Wang et al., 2022)."""
        from headwater.localize.judging.faithfulness import minimality

        return minimality(self, behavior, metric=metric, nodes=nodes, ablation=ablation, model=model)

    def null(
        self,
        behavior: "Behavior",
        *,
        n: int = 100,
        metric: str = "logit_diff",
        kinds: Iterable[str] = ("edges", "heads"),
        seed: int = 0,
        ablation: "AblationLike" = "counterfactual",
        model: "Model | None" = None,
    ) -> "NullResult":
        """Faithfulness of `n` random circuits of each kind, matched in size and layer profile; see `nulls.py`."""
        from headwater.localize.judging.faithfulness import null

        return null(self, behavior, n=n, metric=metric, kinds=kinds, seed=seed, ablation=ablation, model=model)

    def curve(
        self,
        behavior: "Behavior",
        *,
        metric: str = "logit_diff",
        fractions: Iterable[float] = mib.FRACTIONS,
        rank: Rank = "abs",
        how: Any = "topn",
        ablation: "AblationLike" = "counterfactual",
        model: "Model | None" = None,
    ) -> "FaithfulnessResult":
        """Faithfulness over sizes cut from this circuit's ranking, with MIB's areas CPR and CMD."""
        from headwater.localize.judging.faithfulness import curve

        return curve(
            self.graph, self._ranking(), model or self.model, behavior,
            metric=metric, fractions=tuple(fractions), rank=rank, how=how, ablation=ablation,
        )  # fmt: skip

    # --- files of others

    def to_json(self, path: str | Path | None = None, *, per_head: bool = True) -> str:
        """The circuit in the JSON form of MIB submissions; written to `path` if given.

        `per_head=False` keeps shared key/value heads as they are (`a0.g1<k>`) instead of once for each query head.
        """
        text = json.dumps(mib.to_mib(self.graph, self.mask, self.scores, per_head=per_head), allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | Path, *, model: "Model | None" = None) -> Self:
        """A circuit from MIB's JSON form. With `model`, it is checked against that model's graph and bound to it."""
        n_kv_heads = model.n_kv_heads if model is not None else None
        graph, mask, scores = mib.from_mib(mib.read_json(path), n_kv_heads=n_kv_heads)
        circuit = cls.build(graph, mask, scores, method="file")
        return circuit if model is None else circuit.bind(model)
