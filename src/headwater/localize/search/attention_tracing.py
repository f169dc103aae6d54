"""Tracing attention backwards: the computation graph of an answer as steps from token to token, each verified.

From the answer's position, each head's move from another token is weighed by what it carries for the metric (not by
its attention alone), the heaviest are followed to the token they come from, and so on below them. What such a tree
claims, an intervention checks: the head is kept from attending from that token to that one, and the metric measured.

Shapes: B prompts, H heads, T query tokens, S source tokens, D width.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.claims.statistics import sign_flip
from headwater.core.errors import MethodError
from headwater.core.interventions import add
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.attribution.eap import LOWER_IS_BETTER, configured
from headwater.localize.catalog import methods
from headwater.localize.engine.passes import Engine, Scored, for_discovery, tokens_at_once
from headwater.localize.search.moves import Moves, captured, moves_of
from headwater.localize.search.roles import token_roles, token_table
from headwater.localize.stats import ratio

if TYPE_CHECKING:
    from headwater.behavior.bind import Group
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Weight = Literal["contribution", "norm"]
Knockout = Literal["mask", "zero"]
_TREES: dict[str, Any] = {
    "row": pl.Int64, "step": pl.Int64, "parent": pl.Int64, "depth": pl.Int64, "layer": pl.Int64, "head": pl.Int64,
    "query": pl.Int64, "source": pl.Int64, "query_role": pl.String, "source_role": pl.String, "attention": pl.Float64,
    "weight": pl.Float64, "effect": pl.Float64, "control": pl.Float64,
}  # fmt: skip
_STEPS: dict[str, Any] = {
    "layer": pl.Int64, "head": pl.Int64, "query_role": pl.String, "source_role": pl.String, "n": pl.Int64,
    "share": pl.Float64, "attention": pl.Float64, "weight": pl.Float64, "effect": pl.Float64, "lo": pl.Float64,
    "hi": pl.Float64, "control": pl.Float64, "p": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """branches: steps followed from a token at most. depth: steps after one another at most. least: the smallest weight
    that is followed (a share of the metric's way from counterfactual to prompt, or of all that heads carry).

    weight: "contribution" is what the head carries from that token along the metric's gradient, "norm" its size as a
    share of what all heads of the layer carry to the token (needs no gradient). knockout: "mask" takes the token out of
    the head's softmax, so that the others share its attention; "zero" only takes its part away. seed: of the controls.
    """

    branches: int = 3
    depth: int = 2
    least: float = 0.02
    weight: Weight = "contribution"
    knockout: Knockout = "mask"
    metric: str = "logit_diff"
    seed: int = 0
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        if min(self.branches, self.depth) < 1 or self.least < 0:
            raise MethodError(
                "a trace follows at least one branch for one step", got=f"{self.branches}, {self.depth}, {self.least}"
            )


@register_result
class TracingResult(Result):
    """Trees of attention steps, and what knocking each out does.

    `tables["trees"]`: row (of the behavior), step, parent (-1: the answer's position), depth, layer, head, query and
    source (token positions), their roles, attention, weight, effect (of the knockout), control (the same knockout of a
    random other head of that layer). `tables["steps"]`, the prompts' steps with roles in place of positions: layer,
    head, query_role, source_role, n (prompts), share (of all prompts), attention, weight and effect (means), lo, hi,
    control, p (sign flips of effect - control). Weight and effect are shares of the metric's way from counterfactual to
    prompt: 1 is all of it, positive speaks for the behavior. `tables["tokens"]`: row, position, token, role.
    """

    kind: ClassVar[str] = "attention_tracing"
    main: ClassVar[str] = "steps"

    def text(self, row: int) -> str:
        """One prompt's tree as text, a step a line. Raises MethodError for a row that was not traced."""
        tokens = self.tables["tokens"].filter(pl.col("row") == row).sort("position").to_dicts()
        if not tokens:
            raise MethodError(
                "this prompt was not traced", got=row, wanted=sorted(set(self.tables["tokens"]["row"].to_list()))
            )

        def name(position: int) -> str:
            return f"{tokens[position]['token']!r} ({tokens[position]['role']})"

        steps = self.tables["trees"].filter(pl.col("row") == row).to_dicts()
        lines = [name(len(tokens) - 1)]

        def below(parent: int, indent: str) -> None:
            own = [step for step in steps if step["parent"] == parent]
            for step in own:
                last = step is own[-1]
                lines.append(
                    f"{indent}{'└' if last else '├'}─ a{step['layer']}.h{step['head']} reads {name(step['source'])}: "
                    f"attention {step['attention']:.2f}, weight {step['weight']:+.3f}, "
                    f"without it {-step['effect']:+.3f}"
                )
                below(step["step"], indent + ("   " if last else "│  "))

        below(-1, "")
        return "\n".join(lines)


@methods.register("attention_tracing")
def attention_tracing(
    model: "Model", behavior: "Behavior", *, config: TracingConfig | None = None, **options: Any
) -> TracingResult:
    """The computation graph of an answer on an algorithmic task: attention traced backwards from it, each step knocked
    out to verify it (after Elhage et al., 2021, and the attention knockout of Geva et al., 2023).

    One forward and one backward a prompt find the steps; one forward a step (and one for its control) verifies it.
    Traces `behavior.train` where there is a split. Options are those of `TracingConfig`. Known failure: a step is
    weighed by its effect through all that follows, so a lower step may act past the step it is drawn under; and a step
    whose backup takes over shows no effect when knocked out.

    Raises ModelError for a model without a circuit graph, or whose attention is not its pattern times its values.
    """
    used = configured(TracingConfig, config, options)  # type: ignore[type-var]
    if used.weight == "contribution" and used.metric == "kl":
        raise MethodError(
            "the gradient of KL is zero on the prompt itself", wanted="logit_diff or prob_diff", fix="Use weight=norm"
        )
    started = time.monotonic()
    metric = Scored.named(used.metric, differentiable=used.weight == "contribution")
    engine = Engine(model)
    graph = engine.wiring.graph
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    at_once = tokens_at_once(model, graph.n_layers * 40 * graph.d_model, used.memory_mb)
    parts = [part for group in bound.groups for part in group.parts(max(1, at_once // group.length))]
    sign = -1.0 if used.metric in LOWER_IS_BETTER else 1.0
    traced = [_Traced(engine, metric, used, part, sign) for part in track(parts, "attention_tracing: forward")]
    clean, corrupt = (torch.cat([getattr(t, name) for t in traced]) for name in ("clean", "corrupt"))
    width = float((clean - corrupt).mean())
    if width == 0.0:
        raise MethodError(f"{used.metric} is the same on prompts and counterfactuals", got=float(clean.mean()))
    generator = torch.Generator().manual_seed(used.seed)
    knockouts = 0
    for one in track(traced, "attention_tracing: knockouts"):
        one.grow(width)
        knockouts += one.verify(width, generator)
    trees = pl.DataFrame([row for one in traced for row in one.rows()], schema=_TREES, orient="row")
    tables = {
        "steps": _by_role(trees, bound.n, used.seed),
        "trees": trees,
        "tokens": pl.concat([token_table(one.group, one.roles, model.tokenizer) for one in traced]),
    }
    backward = float(bound.n) if used.weight == "contribution" else 0.0
    facts = {
        "method": "attention_tracing",
        "metric": used.metric,
        "n": bound.n,
        "clean": float(clean.mean()) * sign,
        "corrupt": float(corrupt.mean()) * sign,
        "passes": {"forward": float(2 * bound.n + knockouts), "backward": backward},
    }
    return TracingResult(
        tables=tables,
        facts=facts,
        config={"method": "attention_tracing", **asdict(used)},
        provenance=Provenance.collect(model, pairs, seed=used.seed, seconds=time.monotonic() - started),
    )


def contributions(moves: Moves, gradient: Tensor) -> Tensor:
    """[B, H, T, S]: what each head carries from token to token, along the gradient [B, T, D] at what attention adds."""
    along = torch.einsum("bhsd,btd->bhts", moves.write, gradient)
    found = moves.pattern * along
    portion = moves.pattern / moves.rows[..., None]
    if moves.shared is not None:
        found = found + portion * (gradient @ moves.shared)[:, None, :, None]
    found = found * moves.deviation[:, None, :, None]
    if moves.constant is not None:
        found = found + portion * (gradient @ moves.constant)[:, None, :, None]
    return found


def sizes(moves: Moves) -> Tensor:
    """[B, H, T, S]: the l2 norm of what each head carries from token to token, as a share of the layer's to a token."""
    found = torch.zeros_like(moves.pattern)
    for head, queries, terms in moves.pieces():
        found[:, head, queries] = terms.norm(dim=-1)
    return found / found.sum(dim=(1, 3), keepdim=True).clamp(min=1e-30)


@dataclass(kw_only=True, eq=False)
class _Step:
    """One step of one prompt's tree."""

    parent: int
    depth: int
    layer: int
    head: int
    query: int
    source: int
    attention: float
    weight: float
    effect: float = float("nan")
    control: float = float("nan")

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.layer, self.head, self.query, self.source


@dataclass(eq=False)
class _Traced:
    """One batch of prompts: its steps' weights [B, L, H, T, S], then the trees, then their knockouts."""

    engine: Engine
    metric: Scored
    config: TracingConfig
    group: "Group"
    sign: float
    trees: list[list[_Step]] = field(default_factory=list)

    def __post_init__(self) -> None:
        engine, group = self.engine, self.group
        self.roles = token_roles(group)
        layers = engine.wiring.layers
        wanted = self.config.weight == "contribution"
        run = captured(engine.model, group.clean, ("v", "pattern", "z", "attn_out"), logits="last", grad=wanted)
        assert run.logits is not None
        self.reference = run.logits.detach()
        gradients: dict[str, Tensor] = {}
        if wanted:
            names = [f"attn_out.{index}" for index in range(len(layers))]
            gradients = run.grads(self._score(run.logits, slice(None)).sum(), names)
        with torch.no_grad():
            weights, patterns = [], []
            for index, layer in enumerate(layers):
                moves = moves_of(layer, run, engine.work)
                patterns.append(moves.pattern.detach())
                found = contributions(moves, gradients[f"attn_out.{index}"].to(engine.work)) if wanted else sizes(moves)
                weights.append(found.detach())
            self.weights, self.patterns = torch.stack(weights, dim=1), torch.stack(patterns, dim=1)
            self.clean = self._score(self.reference, slice(None)).double().cpu()
            other = engine.model.run(group.corrupt, logits="last", batch_size=len(group)).logits
            self.corrupt = self._score(other, slice(None)).double().cpu()

    def _score(self, logits: Any, rows: Any) -> Tensor:
        answers, foils = self.group.answers.to(logits.device), self.group.foils.to(logits.device)
        return self.sign * self.metric.metric(logits, answers[rows], foils[rows], self.reference[rows])

    def grow(self, width: float) -> None:
        """Follow the heaviest steps of every prompt, from its last token down."""
        config = self.config
        weights = (self.weights / width if config.weight == "contribution" else self.weights).cpu()
        layers, heads, length = weights.shape[1], weights.shape[2], weights.shape[3]
        for row in range(len(self.group)):
            tree: list[_Step] = []
            frontier = [(-1, 0, layers, length - 1)]  # step, its depth, the layer it reads below, the token it reads
            while frontier:
                parent, depth, ceiling, token = frontier.pop(0)
                # what a token carries to itself is no step
                here = weights[row, :ceiling, :, token, :token].reshape(-1)
                for place in torch.argsort(here.abs(), descending=True, stable=True)[: config.branches].tolist():
                    weight = float(here[place])
                    if abs(weight) < max(config.least, 1e-12):
                        break
                    layer, rest = divmod(place, heads * token)
                    head, source = divmod(rest, token)
                    attention = float(self.patterns[row, layer, head, token, source])
                    tree.append(
                        _Step(
                            parent=parent, depth=depth, layer=layer, head=head, query=token, source=source,
                            attention=attention, weight=weight,
                        )
                    )  # fmt: skip
                    if depth + 1 < config.depth and layer > 0 and source > 0:
                        frontier.append((len(tree) - 1, depth + 1, layer, source))
            self.trees.append(tree)

    def verify(self, width: float, generator: torch.Generator) -> int:
        """Knock out every step and a random other head in its place; how many forwards of one prompt that took."""
        n_heads = self.weights.shape[2]
        jobs: dict[tuple[int, tuple[int, int, int, int]], float] = {}
        controls: dict[tuple[int, tuple[int, int, int, int]], tuple[int, int, int, int] | None] = {}
        for row, tree in enumerate(self.trees):
            places = {step.place for step in tree}
            for layer, head, query, source in sorted(places):
                jobs[row, (layer, head, query, source)] = 0.0
                free = [h for h in range(n_heads) if (layer, h, query, source) not in places]
                at = int(torch.randint(len(free), (1,), generator=generator)) if free else -1
                other = (layer, free[at], query, source) if free else None
                controls[row, (layer, head, query, source)] = other
                if other is not None:
                    jobs[row, other] = 0.0
        listed = sorted(jobs, key=lambda job: (job[1], job[0]))
        size = max(1, len(self.group))
        for start in range(0, len(listed), size):
            some = listed[start : start + size]
            for job, value in zip(some, self._without(some), strict=True):
                jobs[job] = float(self.clean[job[0]] - value) / width
        for row, tree in enumerate(self.trees):
            for step in tree:
                step.effect = jobs[row, step.place]
                other = controls[row, step.place]
                step.control = jobs[row, other] if other is not None else float("nan")
        return len(listed)

    def _without(self, jobs: Sequence[tuple[int, tuple[int, int, int, int]]]) -> list[float]:
        """The metric of some prompts, each with one head kept from attending from one token to another."""
        rows = [row for row, _ in jobs]
        site = "scores" if self.config.knockout == "mask" else "pattern"
        changes: dict[int, Tensor] = {}
        pattern = self.patterns
        for at, (row, (layer, head, query, source)) in enumerate(jobs):
            if layer not in changes:
                changes[layer] = pattern.new_zeros(len(jobs), *pattern.shape[2:]).to(self.engine.model.dtype)
            low = torch.finfo(self.engine.model.dtype).min / 2
            changes[layer][at, head, query, source] = (
                low if site == "scores" else -pattern[row, layer, head, query, source]
            )
        edits = [add(f"{site}.{layer}", change) for layer, change in sorted(changes.items())]
        ids = self.group.clean[torch.tensor(rows)]
        with torch.no_grad():
            logits = self.engine.model.run(ids, logits="last", interventions=edits, batch_size=len(rows)).logits
            return self._score(logits, rows).double().tolist()

    def rows(self) -> list[tuple[Any, ...]]:
        return [
            (
                self.group.rows[row], at, step.parent, step.depth, step.layer, step.head, step.query, step.source,
                self.roles[row][step.query], self.roles[row][step.source], step.attention, step.weight, step.effect,
                step.control if step.control == step.control else None,
            )
            for row, tree in enumerate(self.trees)
            for at, step in enumerate(tree)
        ]  # fmt: skip


def _by_role(trees: pl.DataFrame, n: int, seed: int) -> pl.DataFrame:
    """Each step with roles in place of positions, over the prompts in whose tree it is."""
    keys = ["layer", "head", "query_role", "source_role"]
    values = ["attention", "weight", "effect", "control"]
    # a prompt counts once, however often the step is in its tree
    once = trees.group_by([*keys, "row"], maintain_order=True).agg(pl.col(values).mean())
    rows: list[tuple[Any, ...]] = []
    for key, found in once.group_by(keys, maintain_order=True):
        effects = torch.tensor(found["effect"].to_list(), dtype=torch.float64)
        mean, low, high = ratio(effects, torch.ones_like(effects), seed=seed)
        paired = found.drop_nulls("control")
        beyond = (paired["effect"] - paired["control"]).to_list()
        rows.append(
            (
                *key, found.height, found.height / n, found["attention"].mean(), found["weight"].mean(), mean, low,
                high, found["control"].mean(), sign_flip(beyond, side="two-sided", seed=seed) if beyond else None,
            )
        )  # fmt: skip
    table = pl.DataFrame(rows, schema=_STEPS, orient="row")
    return table.sort(["share", pl.col("effect").abs(), *keys], descending=[True, True, False, False, False, False])
