"""Steering curves: what an action does at each strength, and what that costs plain text."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl

from headwater.act.action import Action
from headwater.act.measuring import NOTHING, main_metric, score, text_loss, texts_of
from headwater.claims.statistics import bootstrap
from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_SCHEMA = {
    "action": pl.String,
    "strength": pl.Float64,
    "value": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "accuracy": pl.Float64,
    "n": pl.Int64,
    "perplexity": pl.Float64,
    "perplexity_lo": pl.Float64,
    "perplexity_hi": pl.Float64,
    "texts": pl.Int64,
    "chosen": pl.Boolean,
}


@register_result
class SteeringCurve(Result):
    """What actions do at each strength.

    `tables["curve"]`: action, strength (null: nothing is done; 0 may do something, as a factor does), value (the mean
    over test pairs of the metric, counted in the goal's direction), lo, hi (95% bootstrap), accuracy, n, perplexity of
    plain text (with the action on at every token) with its interval over texts, texts, chosen (the strength that was
    chosen on training pairs). Facts: metric,
    goals.
    """

    kind: ClassVar[str] = "steering_curve"
    main: ClassVar[str | None] = "curve"


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """What was measured and how."""

    strengths: tuple[float, ...]
    text_tokens: int
    seed: int


def curves(
    model: "Model",
    behavior: "Behavior",
    action: Action | Sequence[Action],
    strengths: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    *,
    text: str | Sequence[str] | None = None,
    text_tokens: int = 48,
    seed: int = 0,
) -> SteeringCurve:
    """Measure actions at each of `strengths`, and at the one they came with, on the test pairs and on plain text.

    action: what steering methods, and edits with a strength, return. text: as in `effect`. Nothing is chosen here: the
    curve shows what a choice on training pairs would have had to pay elsewhere. Raises MethodError for actions that
    have no strength.
    """
    actions = [action] if isinstance(action, Action) else list(action)
    if not actions or any(one.at is None for one in actions):
        bad = ", ".join(one.name for one in actions if one.at is None) or "none"
        raise MethodError("a curve needs actions with a strength", got=bad, fix="Pass what steering methods return")
    texts, bound, metric = texts_of(text), behavior.test.bind(model), main_metric(behavior)
    rows: list[dict[str, Any]] = []
    plain = _measure(model, bound, NOTHING, metric, texts, text_tokens)
    for one in actions:
        signs = one.goal.signs(bound.behavior.frame, part=True)
        order = bound.behavior.frame.select("id").with_columns(sign=pl.Series(signs))
        own = float(one.config.get("strength", np.nan))
        asked = sorted({float(s) for s in strengths} | ({own} if np.isfinite(own) else set()))
        for strength in track([None, *asked], one.name):
            changed = one.at(strength) if one.at is not None and strength is not None else None
            pairs, losses = plain if changed is None else _measure(model, bound, changed, metric, texts, text_tokens)
            joined = order.join(pairs, on="id", how="inner", maintain_order="left")
            value = bootstrap(joined["sign"].to_numpy() * joined[metric].to_numpy(), seed=seed)
            fluency = bootstrap(losses, statistic=_perplexity, seed=seed)
            rows.append(
                {
                    "action": _name(one),
                    "strength": strength,
                    "value": value.value,
                    "lo": value.lo,
                    "hi": value.hi,
                    "accuracy": float(joined["accuracy"].mean()),  # type: ignore[arg-type]
                    "n": joined.height,
                    "perplexity": fluency.value,
                    "perplexity_lo": fluency.lo,
                    "perplexity_hi": fluency.hi,
                    "texts": len(texts),
                    "chosen": strength is not None and strength == own,
                }
            )
    config = CurveConfig(strengths=tuple(map(float, strengths)), text_tokens=text_tokens, seed=seed)
    return SteeringCurve(
        tables={"curve": pl.DataFrame(rows, schema=_SCHEMA, orient="row")},
        facts={"behavior": behavior.name, "metric": metric, "goals": {_name(one): str(one.goal) for one in actions}},
        config=dataclasses.asdict(config),
        provenance=Provenance.collect(model, behavior, seed=seed),
    )


def _measure(model: "Model", bound: Any, action: Action, metric: str, texts: list[str], tokens: int) -> tuple[Any, Any]:
    with action.edited(model) as rest:
        return score(model, bound, rest, dict.fromkeys((metric, "accuracy"))), text_loss(
            model, texts, rest, tokens=tokens
        )


def _perplexity(losses: Any, axis: int = -1) -> Any:
    return np.exp(np.minimum(losses.mean(axis), 50.0))


def _name(action: Action) -> str:
    """An action's name without its strength."""
    site = action.config.get("site", "")
    method = action.config.get("method", "")
    return f"{method} at {site}" if method and site else action.name
