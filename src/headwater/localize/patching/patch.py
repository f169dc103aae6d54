"""Exhaustive activation patching: put another run's value, or none, at a site of a run, and see how far the metric
goes.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.catalog import fitted, methods
from headwater.localize.engine.cost import counted
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    Scored,
    can_narrow,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.engine.planning import Plan, Tally, plans
from headwater.localize.engine.schedule import KINDS, PROJECTED, Joint, Patch
from headwater.localize.engine.sites import Set, Spec, check_positions, check_window, patches, positions_of, read_sites
from headwater.localize.engine.sweep import Fill, Sweep, geometry_of
from headwater.localize.patching.corruption import (
    FIXED,
    Corruption,
    Direction,
    Means,
    Noise,
    direction_of,
    donors,
    embedding_deviation,
    resampled,
    spans_asked,
    with_starts,
    without_prefix,
    zeros,
)
from headwater.localize.patching.disagreement import compare_metrics
from headwater.localize.stats import ratio

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_MAX_TOKENS = 4096
EFFECTS = {
    "site": pl.String,
    "kind": pl.String,
    "layer": pl.Int64,
    "head": pl.Int64,
    "position": pl.String,
    "effect": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.Int64,
    "direction": pl.String,
}


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """sites: what to patch, each `kind[.layer][.hN][@position]`, or several joined by `+`, patched together.

    Kinds: resid_pre, resid_mid, resid_post, attn_out, mlp_out, head, and q, k, v (heads' queries, key and value
    heads' keys and values); without a layer (or head) every one is meant. `@*`: each position apart, counted from the
    end; `@END`, `@S2`: a named position of the behavior (its last token), `@S2[0]` its first, `@S2[:]` all of its
    tokens; `@-1`, `@2:5`, `@1,4`: by index; without `@`: all positions at once.

    corruption: what is put in. "counterfactual": the counterfactual run's value. "noise": that of the prompt run with
    noise on the embeddings at `noise_at` (None: where the two prompts differ), `noise` times as wide as embeddings are,
    mean over `samples` draws. "zero", "mean" (over counterfactuals and positions), "mean_positional" (over
    counterfactuals of the same length, at each position), "resample" (the value of another pair's prompt of the same
    length): values put into the prompt's run.
    direction: "denoise" puts the prompt's value into the corrupt run, "noise" the corrupt value into the prompt's run;
    None: denoise, or noise for a fixed value, where nothing else has a meaning.
    metrics: further metrics, read off the same passes. window: how many layers around each are patched at once.
    memory_mb: what a batch may take (None: .4 of what the weights take, at least 96).
    """

    sites: tuple[str, ...] = ("head",)
    direction: Direction | None = None
    metric: str = "logit_diff"
    metrics: tuple[str, ...] = ()
    corruption: Corruption = "counterfactual"
    window: int = 1
    noise: float = 3.0
    noise_at: str | None = None
    samples: int = 10
    seed: int = 0
    memory_mb: float | None = None


@register_result
class PatchingResult(Result):
    """`tables["effects"]`: site, kind, layer, head, position, effect, lo, hi, n, direction; one row a patched site.

    The effect is a ratio of means over pairs: 0 leaves the run as it was, 1 moves the metric all the way to the other
    run. facts: clean and corrupt (the metric's means), metric, n, ran (what was run: see `cost.Ran`). `tensors`: values
    [sites, n] (NaN where a pair has no such position), clean and corrupt [n].

    With several metrics: `tables["metrics"]`: site, metric, effect, lo, hi; `tables["agreement"]` and
    `tables["disagreement"]` (see `disagreement.compare_metrics`); `tensors`: values_NAME of each further metric.
    """

    kind: ClassVar[str] = "patching"
    main: ClassVar[str] = "effects"

    def top(self, n: int = 10) -> pl.DataFrame:
        """The `n` sites of largest |effect|."""
        return self.tables["effects"].sort(pl.col("effect").abs(), descending=True).head(n)


@methods.register("patch")
def patch(
    model: "Model",
    behavior: "Behavior",
    *,
    sites: str | Sequence[str] = ("head",),
    direction: Direction | None = None,
    metric: str = "logit_diff",
    metrics: str | Sequence[str] = (),
    corruption: Corruption = "counterfactual",
    window: int = 1,
    noise: float = 3.0,
    noise_at: str | None = None,
    samples: int = 10,
    seed: int = 0,
    memory_mb: float | None = None,
) -> PatchingResult:
    """Patch every wanted site in turn and measure its effect (Meng et al., 2022; Zhang & Nanda, 2024). Exact, no
    approximation.

    Runs on `behavior.train` where there is a split. See `PatchConfig` for the options. Denoising finds what is enough
    to bring the behavior back, noising what it cannot do without. Known failure: backup heads hide each other from
    noising; zero and mean put the model where no text would, so what breaks need not be what was used.

    >>> hw.localize.patch(model, ioi, sites=["head", "resid_pre@*"]).top(5)  # doctest: +SKIP

    Raises SiteError for an unknown kind, layer, head or position, ModelError for a model whose blocks are not a sum of
    writes, MethodError for options that do not go together.
    """
    started = time.monotonic()
    given = {
        "direction": direction,
        "metric": metric,
        "corruption": corruption,
        "window": window,
        "noise": noise,
        "noise_at": noise_at,
        "samples": samples,
        "seed": seed,
        "memory_mb": memory_mb,
    }
    used = PatchSetting.of(model, behavior, sites, metrics, given)
    used.prepare()
    found: dict[Patch, dict[int, Tensor]] = {}
    base: dict[int, Tensor] = {}
    other: dict[int, Tensor] = {}
    with counted(model) as ran:
        fill = used.fill()
        for batch in track(used.batches, f"patching ({used.direction})"):
            base_value, other_value, values = used.run(batch, fill)
            base |= _by_row(batch, base_value)
            other |= _by_row(batch, other_value)
            for one, value in values.items():
                found.setdefault(one, {}).update(_by_row(batch, value))
    result = _result(used, found, base, other, ran.to_dict())
    result.provenance = Provenance.collect(model, used.pairs, seed=seed, seconds=time.monotonic() - started)
    return result


@dataclass(eq=False)
class PatchSetting:
    """Everything about a sweep that is known before it runs."""

    engine: Engine
    config: PatchConfig
    scored: tuple[Scored, ...]
    specs: list[Spec | Set]
    pairs: "Behavior"
    bound: "Bound"
    direction: Direction
    reuse: bool
    batches: list[Batch]
    at_once: int
    noise: Noise | None = None
    alone: int = 0
    given: dict[int, Tensor] | None = None

    @classmethod
    def of(
        cls,
        model: "Model",
        behavior: "Behavior",
        sites: str | Sequence[str],
        metrics: str | Sequence[str],
        options: dict[str, Any],
    ) -> "PatchSetting":
        names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        wanted = (sites,) if isinstance(sites, str) else tuple(sites)
        direction = direction_of(options.get("corruption", "counterfactual"), options.get("direction"))
        config = fitted(PatchConfig, {**options, "sites": wanted, "metrics": names, "direction": direction})
        if config.samples < 1 or config.noise <= 0:
            got = f"samples={config.samples}, noise={config.noise}"
            raise MethodError("noise needs samples and a size", got=got, wanted="both above 0")
        scored = tuple(Scored.named(name) for name in dict.fromkeys((config.metric, *config.metrics)))
        engine = Engine(model)
        graph = engine.wiring.graph
        specs = read_sites(config.sites, graph)
        check_window(config.window, specs)
        pairs = for_discovery(behavior)
        places = [*positions_of(specs), config.noise_at if config.corruption == "noise" else None]
        bound = with_starts(pairs, spans_asked(places)).bind(model)
        check_positions(specs, bound.groups[0].positions)
        samples = config.samples if config.corruption == "noise" else 1
        at_once = min(_MAX_TOKENS, tokens_at_once(model, graph.d_model * 30, config.memory_mb))
        # the recorded base and other run take more a position than what is run on top of them
        recorded = tokens_at_once(model, graph.d_model * 16 * graph.n_layers, config.memory_mb)
        batches = make_batches(bound, max(1, recorded // samples), reuse_prefix=config.corruption not in FIXED)
        reuse, _ = can_reuse_prefix(engine), can_narrow(engine)  # measured before any run is counted
        used = cls(engine, config, scored, specs, pairs, bound, direction, reuse, batches, at_once)
        if config.corruption == "resample":
            used._find_donors()
        return used

    def _find_donors(self) -> None:
        self.given = donors(self.bound, self.config.seed)
        kept = []
        for batch in self.batches:  # all pairs of a length have a donor, or the only one has none
            if batch.rows[0] in self.given:
                kept.append(batch)
            else:
                self.alone += len(batch)
        if not kept:
            raise MethodError(
                "no pair can be given another's value", got="prompts that all differ in length", fix="Give more pairs"
            )
        self.batches = kept

    def prepare(self) -> None:
        """What has to be known of the prompts before the first run."""
        if self.config.corruption == "noise":
            draft = Noise(at=self.config.noise_at, samples=self.config.samples, deviation=1.0, seed=self.config.seed)
            masks = [(batch, draft.where(self.engine, batch)) for batch in self.batches]
            deviation = self.config.noise * embedding_deviation(self.engine, masks)
            self.noise = replace(draft, deviation=deviation)

    @property
    def made(self) -> bool:
        specs = [spec for one in self.specs for spec in (one.specs if isinstance(one, Set) else (one,))]
        return any(spec.kind in PROJECTED for spec in specs)

    def fill(self) -> Fill | None:
        """What stands in for the other run, where that is none."""
        kind = self.config.corruption
        if kind == "zero":
            return zeros
        if kind in ("mean", "mean_positional"):
            return Means(kind == "mean_positional", self.made).learn(self.engine, self.batches).fill
        if kind == "resample":
            assert self.given is not None
            return resampled(self.given, self.made)
        return None

    def widened(self, batch: Batch) -> Batch:
        """The batch as it is run: with its samples of noise, or with nothing shared for a fixed value."""
        if self.config.corruption == "noise":
            noise = self.noise or Noise(at=self.config.noise_at, samples=self.config.samples, deviation=1.0, seed=0)
            return noise.batch(self.engine, batch)
        return without_prefix(batch) if self.config.corruption in FIXED else batch

    def targets(self, batch: Batch) -> Iterator[Patch]:
        graph = self.engine.wiring.graph
        return patches(self.specs, graph, batch.clean.shape[1], self.config.window)

    def run(self, batch: Batch, fill: Fill | None) -> tuple[Tensor, Tensor, dict[Patch, Tensor]]:
        """(base, other, each patch) of a batch: the metrics [M, B]."""
        engine, samples = self.engine, self.noise.samples if self.noise else 1
        with engine.open(), ExitStack() as stack:
            noise = self.noise.draw(engine, batch) if self.noise else None
            wide = self.widened(batch)
            if len(self.scored) == 1:
                wide = self.scored[0].narrowed(stack, engine, wide)
            sweep = Sweep(
                engine,
                self.scored,
                wide,
                base_is_clean=self.direction == "noise",
                reuse=self.reuse,
                noise=noise,
                fill=fill,
                made=self.made,
            )
            values = sweep.values(dict.fromkeys(self.targets(batch)), self.at_once)

        def mean(value: Tensor) -> Tensor:
            return value.view(len(value), -1, samples).double().mean(dim=-1).cpu()

        return mean(sweep.base_value), mean(sweep.other_value), {one: mean(value) for one, value in values.items()}


def _by_row(batch: Batch, values: Tensor) -> dict[int, Tensor]:
    """Row -> its values [M]."""
    return dict(zip(batch.rows, values.T, strict=True))


def _result(
    used: PatchSetting,
    found: dict[Patch, dict[int, Tensor]],
    base: dict[int, Tensor],
    other: dict[int, Tensor],
    ran: dict[str, int],
) -> PatchingResult:
    names, order = [one.name for one in used.scored], sorted(base)
    start, end = (torch.stack([side[row] for row in order], dim=1) for side in (base, other))
    if float((end - start)[0].mean()) == 0.0:
        raise MethodError(
            f"{names[0]} is the same on prompts and counterfactuals, so effects are not defined",
            got=float(end[0].mean()),
        )
    missing = torch.full((len(names),), float("nan"), dtype=torch.float64)
    rows, every, values = [], [], []
    effects: dict[str, list[float]] = {name: [] for name in names}
    for one in sorted(found, key=_order):
        own = torch.stack([found[one].get(row, missing) for row in order], dim=1)
        there = ~torch.isnan(own[0])
        values.append(own)
        for index, name in enumerate(names):
            effect = ratio((own - start)[index, there], (end - start)[index, there])
            effects[name].append(effect[0])
            every.append((one.site, name, *effect))
            if index == 0:
                layer = None if isinstance(one, Joint) and used.config.window == 1 else one.layer
                place = (one.site, one.kind, layer, one.head, one.position)
                rows.append((*place, *effect, int(there.sum()), used.direction))
    clean, corrupt = (end, start) if used.direction == "denoise" else (start, end)
    tables = {"effects": pl.DataFrame(rows, schema=EFFECTS, orient="row")}
    stacked = torch.stack(values, dim=1)  # [M, sites, n]
    tensors = {"values": stacked[0].contiguous(), "clean": clean[0].contiguous(), "corrupt": corrupt[0].contiguous()}
    if len(names) > 1:
        schema = {"site": pl.String, "metric": pl.String} | dict.fromkeys(("effect", "lo", "hi"), pl.Float64)
        tables["metrics"] = pl.DataFrame(every, schema=schema, orient="row")
        sites = tables["effects"]["site"].to_list()
        tables["agreement"], tables["disagreement"] = compare_metrics(sites, effects)
        tensors |= {f"values_{name}": stacked[i].contiguous() for i, name in enumerate(names) if i}
    facts: dict[str, Any] = {
        "clean": float(clean[0].mean()),
        "corrupt": float(corrupt[0].mean()),
        "metric": names[0],
        "direction": used.direction,
        "corruption": used.config.corruption,
        "n": len(order),
        "ran": ran,
    }
    if used.noise is not None:
        facts |= {"noise_deviation": used.noise.deviation, "samples": used.noise.samples}
    if used.config.corruption == "resample":
        facts["alone"] = used.alone
    return PatchingResult(tables=tables, tensors=tensors, facts=facts, config=asdict(used.config))


def _order(patch: Patch) -> tuple[int, int, int, int, str, str]:
    position = patch.position or ""
    number = int(position) if re.fullmatch(r"-?\d+", position) else 0
    kind = KINDS.index(patch.kind) if patch.kind in KINDS else len(KINDS)
    name = patch.site if isinstance(patch, Joint) else ""
    return kind, patch.layer, -1 if patch.head is None else patch.head, number, position, name


# --- the plan


@plans.register("patch")
def _plan(
    model: "Model",
    behavior: "Behavior",
    *,
    sites: str | Sequence[str] = ("head",),
    metrics: str | Sequence[str] = (),
    **options: Any,
) -> Plan:
    known = [name for name in PatchConfig.__dataclass_fields__ if name not in ("sites", "metrics")]
    if unknown := [name for name in options if name not in known]:
        raise MethodError("unknown option of patch", got=", ".join(unknown), wanted=", ".join(known))
    used = PatchSetting.of(model, behavior, sites, metrics, options)
    tally = Tally(model, used.config.memory_mb)
    for batch in used.batches:
        plan_sweep(tally, used.engine, used.widened(batch), used.targets(batch), used, batch)
    return tally.plan("patch", n=sum(len(batch) for batch in used.batches))


def plan_sweep(
    tally: Tally, engine: Engine, wide: Batch, targets: Iterator[Patch], used: PatchSetting, batch: Batch
) -> None:
    """Add the passes of one sweep."""
    from headwater.localize.engine.planners import words_read

    length = batch.clean.shape[1]
    cached = used.reuse and not drops_keys(engine, length)
    geometry = geometry_of(engine, wide, cached=cached)
    words = words_read(engine.model, [one.name for one in used.scored], batch)
    kind, rows = used.config.corruption, len(wide)
    held = rows * length * engine.wiring.d_model * 16 * tally.n_layers * tally.costs.itemsize / 2
    tally.forward("run that is patched", rows=rows, positions=length, words=words, held=held)
    if kind in FIXED:
        tally.forward("counterfactuals", rows=rows, positions=length, words=words)
    if kind in ("mean", "mean_positional", "resample"):
        name = "other pairs" if kind == "resample" else "mean over counterfactuals"
        tally.forward(name, rows=rows, positions=length, words=words if kind == "resample" else None, held=held)
    elif kind != "zero":
        before = wide.prefix if cached else 0
        tally.forward(
            "run it is patched from", rows=rows, positions=length - before, before=before, words=words, held=held
        )
    every = list(dict.fromkeys(targets))
    jobs = [job for one in every if (job := geometry.planned(one)) is not None]
    narrows = can_narrow(engine)
    for chunk in geometry.chunks(jobs, used.at_once):
        n = len(chunk.jobs)
        attention, mlp = geometry.layers_run(chunk.begin, n, narrows)
        tally.forward(
            "patches",
            rows=n * rows,
            positions=length - chunk.begin.first,
            before=chunk.begin.first,
            attention=attention,
            mlp=mlp,
            words=words,
        )
    tally.floor(rows=rows, positions=length, forwards=2 + len(every))


def drops_keys(engine: Engine, length: int) -> bool:
    """Whether this model's cache forgets keys of so long a prompt (sliding windows)."""
    from transformers import DynamicCache

    layers = DynamicCache(config=engine.hf.config).layers
    windows = [int(w) for layer in layers if (w := getattr(layer, "sliding_window", None))]
    return any(length >= window for window in windows)
