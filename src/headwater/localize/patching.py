"""Exhaustive activation patching: put one run's value at a site into the other run, and see how far the metric goes."""

import re
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, SiteError, did_you_mean
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.core.sites import Site
from headwater.localize.catalog import fitted, methods
from headwater.localize.passes import (
    Batch,
    Engine,
    Scored,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.stats import ratio
from headwater.localize.sweep import KINDS, Sweep, Target

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Direction = Literal["denoise", "noise"]
_SPEC = re.compile(r"(?P<kind>[a-z_]+)(?:\.(?P<layer>\d+|\*))?(?:\.h(?P<head>\d+|\*))?(?:@(?P<pos>[^@]+))?$")
_MAX_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """sites: what to patch, each `kind[.layer][.hN][@position]`.

    Kinds: resid_pre, resid_mid, resid_post, attn_out, mlp_out, head; without a layer (or head) every one is meant.
    `@*`: each position apart, counted from the end; `@END`, `@S2`: a named position of the behavior; `@-1`: an index;
    without `@`: all positions at once. direction: "denoise" puts the prompt's value into the counterfactual run,
    "noise" the counterfactual's into the prompt's. memory_mb: what a batch may take (None: .4 of what the weights
    take, at least 96).
    """

    sites: tuple[str, ...] = ("head",)
    direction: Direction = "denoise"
    metric: str = "logit_diff"
    memory_mb: float | None = None


@register_result
class PatchingResult(Result):
    """`tables["effects"]`: site, kind, layer, head, position, effect, lo, hi, n, direction; one row a patched site.

    The effect is a ratio of means over pairs: 0 leaves the run as it was, 1 moves the metric all the way to the other
    run. facts: clean and corrupt (the metric's means), metric, n. `tensors`: values [sites, n] (NaN where a pair has
    no such position), clean and corrupt [n].
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
    direction: Direction = "denoise",
    metric: str = "logit_diff",
    memory_mb: float | None = None,
) -> PatchingResult:
    """Patch every wanted site in turn and measure its effect (Meng et al., 2022; Zhang & Nanda, 2024). Exact, no
    approximation.

    Runs on `behavior.train` where there is a split. See `PatchConfig` for `sites`. Denoising finds what is enough to
    bring the behavior back, noising what it cannot do without; known failure: backup heads hide each other from
    noising.

    >>> hw.localize.patch(model, ioi, sites=["head", "resid_pre@*"]).top(5)  # doctest: +SKIP

    Raises SiteError for an unknown kind, layer, head or position, ModelError for a model whose blocks are not a sum of
    writes.
    """
    started = time.monotonic()
    wanted = (sites,) if isinstance(sites, str) else tuple(sites)
    given = {"sites": wanted, "direction": direction, "metric": metric, "memory_mb": memory_mb}
    config = fitted(PatchConfig, given)
    scored, engine = Scored.named(metric), Engine(model)
    graph = engine.wiring.graph
    _check_kinds(wanted, graph.parallel)
    specs = [spec for text in wanted for spec in read_spec(text, graph.n_layers, graph.n_heads)]
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    _check_positions(specs, bound.groups[0].positions)
    floats = graph.d_model * 30
    at_once = min(_MAX_TOKENS, tokens_at_once(model, floats, memory_mb))
    # the recorded base and other run take more a position than what is run on top of them
    batches = make_batches(bound, max(1, tokens_at_once(model, graph.d_model * 16 * graph.n_layers, memory_mb)))
    found: dict[Target, dict[int, float]] = {}
    base: dict[int, float] = {}
    other: dict[int, float] = {}
    reuse = can_reuse_prefix(engine)
    for batch in track(batches, f"patching ({direction})"):
        with engine.open(), ExitStack() as stack:
            batch = scored.narrowed(stack, engine, batch)
            sweep = Sweep(engine, scored, batch, base_is_clean=direction == "noise", reuse=reuse)
            base |= _by_row(batch, sweep.base_value)
            other |= _by_row(batch, sweep.other_value)
            values = sweep.values(list(dict.fromkeys(_targets(specs, sweep.length))), at_once)
        for target, value in values.items():
            found.setdefault(target, {}).update(_by_row(batch, value))
    return _result(model, pairs, config, found, base, other, started)


@dataclass(frozen=True)
class Spec:
    """A site or family of sites to patch; `position` is None (all at once), "*" (each), a name or an index."""

    kind: str
    layer: int
    head: int | None
    position: str | None


def read_spec(text: str, n_layers: int, n_heads: int) -> list[Spec]:
    """What one text in `sites` means. Raises SiteError with the known kinds, layers or heads."""
    if re.match(r"(a\d+\.h\d+|m\d+|blocks\.)", text):
        text = str(Site.parse(text))
    match = _SPEC.match(text.strip())
    if match is None or match["kind"] not in KINDS:
        kind = text.split(".")[0].split("@")[0]
        raise SiteError(
            f"cannot patch {text!r} in a sweep",
            wanted=did_you_mean(kind, KINDS),
            fix="Other sites: model.run(..., interventions=[hw.resample(site, run)])",
        )
    kind, layer, head, position = match["kind"], match["layer"], match["head"], match["pos"]
    if head is not None and kind != "head":
        raise SiteError(f"{text!r} names a head, but {kind} has none", wanted="head.LAYER.hHEAD")
    layers = range(n_layers) if layer in (None, "*") else [int(layer)]
    heads: Iterable[int | None] = [None]
    if kind == "head":
        heads = range(n_heads) if head in (None, "*") else [int(head)]
    if any(one >= n_layers for one in layers):
        raise SiteError(f"this model has no layer for {text!r}", wanted=f"0 to {n_layers - 1}")
    if any(one is not None and one >= n_heads for one in heads):
        raise SiteError(f"this model has no head for {text!r}", wanted=f"h0 to h{n_heads - 1}")
    return [Spec(kind, one, which, position) for one in layers for which in heads]


def _check_kinds(wanted: Sequence[str], parallel: bool) -> None:
    for text in wanted:
        if parallel and text.startswith("resid_mid"):
            raise SiteError(
                f"this model has no {text}: its attention and MLP read the stream side by side",
                wanted="resid_pre, resid_post",
            )


def _check_positions(specs: Sequence[Spec], named: dict[str, Tensor]) -> None:
    for position in dict.fromkeys(spec.position for spec in specs):
        if position is not None and position != "*" and position not in named and not re.fullmatch(r"-?\d+", position):
            raise SiteError(
                "unknown position", got=repr(position), wanted=f"*, an index, or {did_you_mean(position, named)}"
            )


def _targets(specs: Sequence[Spec], length: int) -> Iterable[Target]:
    for spec in specs:
        positions = [str(p - length) for p in range(length)] if spec.position == "*" else [spec.position]
        for position in positions:
            yield Target(kind=spec.kind, layer=spec.layer, head=spec.head, position=position)  # type: ignore[arg-type]


def _by_row(batch: Batch, values: Tensor) -> dict[int, float]:
    return dict(zip(batch.rows, values.double().tolist(), strict=True))


def _result(
    model: "Model",
    pairs: "Behavior",
    config: PatchConfig,
    found: dict[Target, dict[int, float]],
    base: dict[int, float],
    other: dict[int, float],
    started: float,
) -> PatchingResult:
    order = sorted(base)
    start = torch.tensor([base[row] for row in order], dtype=torch.float64)
    end = torch.tensor([other[row] for row in order], dtype=torch.float64)
    if float((end - start).mean()) == 0.0:
        raise MethodError(
            f"{config.metric} is the same on prompts and counterfactuals, so effects are not defined",
            got=float(end.mean()),
        )
    rows, values = [], []
    for target in sorted(found, key=_order):
        have = found[target]
        own = torch.tensor([have.get(row, float("nan")) for row in order], dtype=torch.float64)
        there = ~torch.isnan(own)
        effect, low, high = ratio((own - start)[there], (end - start)[there])
        values.append(own)
        rows.append(
            (
                target.site,
                target.kind,
                target.layer,
                target.head,
                target.position,
                effect,
                low,
                high,
                int(there.sum()),
                config.direction,
            )
        )
    schema = {
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
    clean, corrupt = (end, start) if config.direction == "denoise" else (start, end)
    return PatchingResult(
        tables={"effects": pl.DataFrame(rows, schema=schema, orient="row")},
        tensors={"values": torch.stack(values), "clean": clean, "corrupt": corrupt},
        facts={
            "clean": float(clean.mean()),
            "corrupt": float(corrupt.mean()),
            "metric": config.metric,
            "direction": config.direction,
            "n": len(order),
        },
        config=asdict(config),
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )


def _order(target: Target) -> tuple[int, int, int, int, str]:
    position = target.position or ""
    number = int(position) if re.fullmatch(r"-?\d+", position) else 0
    return KINDS.index(target.kind), target.layer, -1 if target.head is None else target.head, number, position
