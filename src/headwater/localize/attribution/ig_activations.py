"""EAP-IG in its activations variant: what each layer writes is moved in turn, gradients are averaged on the way."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.attribution.eap import (
    AttributionResult,
    EapConfig,
    Rule,
    configured,
    integration_nodes,
    score_edges,
)
from headwater.localize.attribution.layer_paths import Paths, Site, sites_of
from headwater.localize.catalog import methods
from headwater.localize.engine.edges import EdgeScorer, ReaderGradients
from headwater.localize.engine.passes import Batch
from headwater.localize.engine.places import places_of
from headwater.localize.engine.writes import Other

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Scope = Literal["all", "own"]
Nodes = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class EapIgActivationsConfig(EapConfig):
    """steps, rule: as for `eap_ig`, here from the reference (0) to the prompt (1); "right", the authors', ends there.

    scope: which passes an edge's gradient is averaged over. "all": those of every site (the input, each layer's
    attention, each MLP), as in the authors' code; "own": those that move the edge's own source, as for features.
    """

    steps: int = 5
    rule: Rule = "right"
    scope: Scope = "all"


@methods.register("eap_ig_activations")
def eap_ig_activations(
    model: "Model", behavior: "Behavior", *, config: EapIgActivationsConfig | None = None, **options: Any
) -> AttributionResult:
    """EAP with integrated gradients over activations (Hanna et al., 2024): what the input, each layer's attention and
    each MLP write is moved, one at a time, from the counterfactual's value to the prompt's.

    With `scope="all"` the scores are those of the authors' EAP-IG (activations) on the same pairs: a reader's gradient
    is the mean over all steps of all 2 L + 1 moved sites, also where the site lies above the reader (the gradient is
    then the prompt's own but for the way through that site). With `scope="own"` only the passes that move the source
    itself count (after Marks et al., 2024): then the edges that leave a layer's attention, together, tend to what
    patching it really does. A pass begins at the layer that it moves; what all share is differentiated once. Options
    are those of `EapIgActivationsConfig`. Known failure: with `scope="all"`, cut ways make scores of a deep model
    smaller than the effects they stand for (by about one part in 2 L + 1 for each site on the way); and activations in
    between are states that no prompt leads to.

    Raises as `eap` does.
    """
    used = configured(EapIgActivationsConfig, config, options)
    if used.scope not in ("all", "own"):
        raise MethodError("unknown scope", got=repr(used.scope), wanted=did_you_mean(str(used.scope), ["all", "own"]))
    nodes = integration_nodes(used.steps, used.rule)

    def add(scorer: EdgeScorer, batch: Batch) -> None:
        score_batch(scorer, batch, nodes, used.scope)

    return score_edges("eap_ig_activations", model, behavior, used, nodes, add=add, passes=2)


def score_batch(scorer: EdgeScorer, batch: Batch, nodes: Nodes, scope: Scope) -> None:
    """Add a batch's scores to the scorer's total."""
    engine = scorer.engine
    with engine.open(), ExitStack() as stack:
        batch = scorer.metric.narrowed(stack, engine, batch)
        past = engine.prefix_cache(batch)
        paths = Paths(engine, scorer.metric, batch, past, narrow=scorer.narrows)
        scorer.note_clean(batch, paths.reference)
        other: Other
        if scorer.fixed is not None:
            other = scorer.fixed
        else:
            other = engine.run(batch.corrupt[:, batch.prefix :], past, narrow=scorer.narrows)
            scorer.note_corrupt(batch, other, paths.reference)
        if scope == "all":
            _all(scorer, batch, paths, other, nodes)
        else:
            _own(scorer, batch, paths, other, nodes)


def _all(scorer: EdgeScorer, batch: Batch, paths: Paths, other: Other, nodes: Nodes) -> None:
    sites = sites_of(scorer.graph.n_layers)
    held = ReaderGradients(scorer, paths.whole.seen)
    upstream = _Upstream(paths)
    for place, weight in nodes:
        share = weight / len(sites)
        if place == 1.0:
            gradients, pre, mid = paths.clean_gradients()

            def below(layer: int, mlp: bool) -> float:
                """How many sites lie before a reader."""
                return 1 + 2 * layer + (mlp and not paths.parallel)

            held.add(gradients, share, shares=below, final=float(len(sites)))
            upstream.add_clean(pre, mid, share)
            continue
        for site in sites:
            part = paths.run(site, paths.written(site) - (1 - place) * paths.differences(site, other))
            held.add(part.gradients, share)
            if part.stream is not None:
                upstream.add(site, part.stream * share)
    held.add(paths.pulled_back(upstream.given()), 1.0, final=0.0)
    scorer.contract(paths.whole.seen, other, held.finished(), places_of(batch, scorer.positions))


class _Upstream:
    """Gradients at streams of the prompt's own run, from where they go on to the readers before a moved site."""

    def __init__(self, paths: Paths) -> None:
        self.paths, self.whole = paths, paths.whole
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def _hold(self, tensor: Tensor, gradient: Tensor) -> None:
        _, before = self._held.get(id(tensor), (tensor, None))
        self._held[id(tensor)] = (tensor, gradient if before is None else before + gradient)

    def add(self, site: Site, gradient: Tensor) -> None:
        """A gradient at the stream with which a site's pass began: what comes before is as on the prompt."""
        behind = site.kind == "mlp" and not self.paths.parallel
        self._hold((self.whole.mid if behind else self.whole.pre)[site.layer], gradient)

    def add_clean(self, pre: list[Tensor], mid: list[Tensor], share: float) -> None:
        """The same of the prompt's own run, for every site at once: all ways but the one through the site."""
        for index, layer in enumerate(self.paths.layers):
            after = pre[index + 1] * share
            if not self.paths.parallel:
                self._hold(self.whole.mid[index], after)
                self._hold(self.whole.pre[index], mid[index].reshape(len(after), -1, after.shape[-1]) * share)
                continue
            self._hold(self.whole.pre[index], after * 2)
            self._hold(self.whole.mlp[index], after * layer.mlp.write.scale)
            self._hold(self.whole.attention[index], after * layer.attention.write.scale)

    def given(self) -> list[tuple[Tensor, Tensor]]:
        """(stream, gradient) pairs."""
        return list(self._held.values())


def _own(scorer: EdgeScorer, batch: Batch, paths: Paths, other: Other, nodes: Nodes) -> None:
    graph, seen = scorer.graph, paths.whole.seen
    places = places_of(batch, scorer.positions)
    held = ReaderGradients(scorer, seen)
    assert seen.embed is not None
    written = torch.empty(graph.n_heads + 1, held.rows.shape[1], held.rows.shape[2], dtype=scorer.work)
    written = written.to(seen.embed.device)
    between = [node for node in nodes if node[0] != 1.0]
    for place, weight in nodes:
        if place == 1.0:
            scorer.contract_once(seen, other, (paths.clean_gradients()[0], weight), places)
    for site in sites_of(graph.n_layers) if between else []:
        held.clear()
        difference = paths.differences(site, other)
        for place, weight in between:
            held.add(paths.run(site, paths.written(site) - (1 - place) * difference).gradients, weight)
        held.finished()
        if site.kind == "input":
            scorer.contract_site(slice(0, 1), difference.reshape(1, *held.rows.shape[1:]).to(scorer.work),
                                 slice(0, len(held.rows)), held, places)  # fmt: skip
            continue
        if site.kind == "attention":
            scorer.write_differences(site.layer, seen, other, written)
            heads, layer = graph.heads_at(site.layer), site.layer
            first = graph.attention_readers_at(layer).stop if not graph.parallel else graph.mlp_reader_at(layer) + 1
            scorer.contract_site(heads, written[:-1], slice(first, len(held.rows)), held, places)
        else:
            at, first = graph.mlp_at(site.layer), graph.mlp_reader_at(site.layer) + 1
            scorer.contract_site(slice(at, at + 1), written[-1:], slice(first, len(held.rows)), held, places)
