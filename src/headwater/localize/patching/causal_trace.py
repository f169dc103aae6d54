"""Causal tracing of facts: which hidden states, given back to a run whose subject is noised, bring the answer back.

Shapes: B facts, S samples of noise, T positions.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.behavior.metrics import interval
from headwater.core.errors import MethodError, did_you_mean
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.attribution.eap import configured
from headwater.localize.catalog import methods
from headwater.localize.engine.cost import counted
from headwater.localize.engine.passes import Batch, for_discovery
from headwater.localize.engine.planning import Plan, Tally, plans
from headwater.localize.engine.schedule import Patch
from headwater.localize.engine.sites import patches, read_sites
from headwater.localize.patching.patch import PatchSetting, plan_sweep

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

GROUPS = ("first subject", "middle subject", "last subject", "first after", "further", "last")
"""Groups of tokens in the order of a prompt; a subject of one token is its last. Tokens before the subject are the same
in both runs and have no effect.
"""
_KINDS = ("resid_post", "mlp_out", "attn_out")
_SITES = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")


@dataclass(frozen=True, kw_only=True)
class CausalTraceConfig:
    """subject: the named span that is noised. kinds: what is restored, each at one token and layer: "resid_post" is the
    hidden state; the others ("mlp_out", "attn_out") in windows of `window` layers around it.

    noise: its size in deviations of the embeddings; samples: draws, averaged for each fact; seed: of the draws. metric:
    "prob" is the probability of the answer. memory_mb: as for `patch`.
    """

    subject: str = "subject"
    kinds: tuple[str, ...] = _KINDS
    window: int = 10
    noise: float = 3.0
    samples: int = 10
    seed: int = 0
    metric: str = "prob"
    memory_mb: float | None = None


@register_result
class CausalTraceResult(Result):
    """`tables["effects"]`: kind, group, layer, effect, lo, hi, share, n: the average indirect effect of giving back one
    kind of state at a layer, at the tokens of a group (mean over a fact's tokens, then over the n facts that have
    some), in the metric's units with a 95% bootstrap interval over facts; share is its part of the total effect.

    facts: clean, noised (the metric's means), total, total_lo, total_hi (clean - noised), noise_deviation, metric, n,
    ran. `tensors`: values [rows, facts] (NaN where a fact has no such token), clean and noised [facts].
    """

    kind: ClassVar[str] = "causal_trace"
    main: ClassVar[str] = "effects"

    def top(self, n: int = 10) -> pl.DataFrame:
        """The `n` largest effects."""
        return self.tables["effects"].sort(pl.col("effect").abs(), descending=True, nulls_last=True).head(n)


@methods.register("causal_trace")
def causal_trace(
    model: "Model", behavior: "Behavior", *, config: CausalTraceConfig | None = None, **options: Any
) -> CausalTraceResult:
    """Causal tracing (Meng et al., 2022): the subject's embeddings are noised, one state of the clean run is given
    back, and what that restores of the answer's probability is its indirect effect.

    The behavior must name a span `subject` (`headwater.behavior.known.known_facts` reads the authors' facts). Runs on
    `behavior.train` where there is a split. Options are those of `CausalTraceConfig`. Known failure: noise takes the
    model where no text would and its size changes the picture (Zhang & Nanda, 2024), and a state that restores an
    answer need not be where editing it works best (Hase et al., 2023); compare with `patch` against a counterfactual.

    >>> hw.localize.causal_trace(model, facts, samples=4).top(5)  # doctest: +SKIP

    Raises MethodError where the behavior names no such span or noise changes nothing.
    """
    started = time.monotonic()
    used, own = _setting(model, behavior, config, options)
    used.prepare()
    found: dict[tuple[str, int, str], dict[int, float]] = {}
    noised: dict[int, float] = {}
    clean: dict[int, float] = {}
    with counted(model) as ran:
        for batch in track(used.batches, "causal tracing"):
            base, other, values = used.run(batch, None)
            noised |= dict(zip(batch.rows, base[0].tolist(), strict=True))
            clean |= dict(zip(batch.rows, other[0].tolist(), strict=True))
            for key, effect in grouped(values, base[0], batch, own.subject).items():
                there = ~torch.isnan(effect)
                rows = [row for row, kept in zip(batch.rows, there.tolist(), strict=True) if kept]
                found.setdefault(key, {}).update(zip(rows, effect[there].tolist(), strict=True))
    result = _result(used, own, found, clean, noised, ran.to_dict())
    result.provenance = Provenance.collect(model, used.pairs, seed=own.seed, seconds=time.monotonic() - started)
    return result


class _TraceSetting(PatchSetting):
    """A sweep over every token and layer, hidden states one at a time and sub-layers in windows."""

    kinds: tuple[str, ...] = ()
    window: int = 1

    def targets(self, batch: Batch) -> Iterator[Patch]:
        graph, length = self.engine.wiring.graph, batch.clean.shape[1]
        for kind in self.kinds:
            window = 1 if kind.startswith("resid") else self.window
            yield from patches(read_sites([f"{kind}@*"], graph), graph, length, window)


def _setting(
    model: "Model", behavior: "Behavior", config: CausalTraceConfig | None, options: dict[str, Any]
) -> tuple[_TraceSetting, CausalTraceConfig]:
    if isinstance(options.get("kinds"), str | list):
        kinds = options["kinds"]
        options = {**options, "kinds": (kinds,) if isinstance(kinds, str) else tuple(kinds)}
    own = configured(CausalTraceConfig, config, options)
    if unknown := [kind for kind in own.kinds if kind not in _SITES]:
        raise MethodError("cannot trace that kind of state", got=unknown[0], wanted=did_you_mean(unknown[0], _SITES))
    if own.window < 1:
        raise MethodError("a window is a number of layers", got=own.window, wanted="1 or more")
    pairs = for_discovery(behavior)
    names = pairs.bind(model).positions
    if own.subject not in names:
        raise MethodError(
            f"behavior {behavior.name!r} names no span {own.subject!r} in every pair, so it has nothing to noise",
            wanted=did_you_mean(own.subject, names),
            fix="Give its rows a position of that name, or name another with subject=",
        )
    given = {
        "corruption": "noise",
        "noise_at": f"{own.subject}[:]",
        "noise": own.noise,
        "samples": own.samples,
        "seed": own.seed,
        "metric": own.metric,
        "memory_mb": own.memory_mb,
    }
    used = _TraceSetting.of(model, behavior, [f"{kind}@*" for kind in own.kinds], (), given)
    assert isinstance(used, _TraceSetting)
    used.kinds, used.window = own.kinds, own.window
    return used, own


def token_groups(length: int, start: int, end: int) -> dict[str, list[int]]:
    """Group -> the positions that are in it, for a subject from token `start` to `end` (the last one) of a prompt."""
    last = length - 1
    found = {
        "first subject": [start] if start < end else [],
        "middle subject": list(range(start + 1, end)),
        "last subject": [end] if end < last else [],
        "first after": [end + 1] if end + 1 < last else [],
        "further": list(range(end + 2, last)),
        "last": [last],
    }
    return {name: places for name, places in found.items() if places}


def grouped(
    values: dict[Patch, Tensor], noised: Tensor, batch: Batch, subject: str
) -> dict[tuple[str, int, str], Tensor]:
    """(kind, layer, group) -> [B]: the mean effect over a fact's tokens of that group; NaN where it has none."""
    length = batch.clean.shape[1]
    groups = [
        token_groups(length, start, end)
        for start, end in zip(batch.positions[f"{subject}[0]"].tolist(), batch.positions[subject].tolist(), strict=True)
    ]
    by_place: dict[tuple[str, int], dict[int, Tensor]] = {}
    for one, value in values.items():
        assert one.position is not None
        by_place.setdefault((one.kind, one.layer), {})[int(one.position) + length] = value[0] - noised
    found = {}
    for (kind, layer), places in by_place.items():
        stacked = torch.stack([places[p] for p in range(length)], dim=1)  # [B, T]
        for name in GROUPS:
            own = [
                float(stacked[row, own[name]].mean()) if name in own else float("nan") for row, own in enumerate(groups)
            ]
            found[kind, layer, name] = torch.tensor(own, dtype=torch.float64)
    return found


def _result(
    used: _TraceSetting,
    config: CausalTraceConfig,
    found: dict[tuple[str, int, str], dict[int, float]],
    clean: dict[int, float],
    noised: dict[int, float],
    ran: dict[str, int],
) -> CausalTraceResult:
    order = sorted(clean)
    ours = torch.tensor([clean[row] for row in order], dtype=torch.float64)
    theirs = torch.tensor([noised[row] for row in order], dtype=torch.float64)
    total = interval((ours - theirs).numpy())
    if total[0] == 0.0:
        raise MethodError(f"noise on the subject does not change {config.metric}, so there is nothing to restore")
    rows, values = [], []
    for kind in config.kinds:
        for name in GROUPS:
            for layer in range(used.engine.wiring.graph.n_layers):
                own = found.get((kind, layer, name), {})
                line = torch.tensor([own.get(row, float("nan")) for row in order], dtype=torch.float64)
                if not own:
                    continue
                mean, low, high = interval(line.numpy())
                rows.append((kind, name, layer, mean, low, high, mean / total[0], len(own)))
                values.append(line)
    schema = {"kind": pl.String, "group": pl.String, "layer": pl.Int64}
    schema |= dict.fromkeys(("effect", "lo", "hi", "share"), pl.Float64) | {"n": pl.Int64}
    assert used.noise is not None
    facts = {
        "metric": config.metric,
        "clean": float(ours.mean()),
        "noised": float(theirs.mean()),
        "total": total[0],
        "total_lo": total[1],
        "total_hi": total[2],
        "noise_deviation": used.noise.deviation,
        "samples": config.samples,
        "window": config.window,
        "n": len(order),
        "ran": ran,
    }
    return CausalTraceResult(
        tables={"effects": pl.DataFrame(rows, schema=schema, orient="row")},
        tensors={"values": torch.stack(values), "clean": ours, "noised": theirs},
        facts=facts,
        config={"method": "causal_trace", **asdict(config)},
    )


@plans.register("causal_trace")
def _plan(model: "Model", behavior: "Behavior", *, config: CausalTraceConfig | None = None, **options: Any) -> Plan:
    used, own = _setting(model, behavior, config, options)
    tally = Tally(model, own.memory_mb)
    for batch in used.batches:
        plan_sweep(tally, used.engine, used.widened(batch), used.targets(batch), used, batch)
    return tally.plan("causal_trace", n=sum(len(batch) for batch in used.batches))
