"""Where to act: the parts of a model by what patching them restores, and how that changes under an action."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from headwater.act.measuring import main_metric, said
from headwater.core.errors import MethodError
from headwater.core.interventions import resample
from headwater.core.progress import track

if TYPE_CHECKING:
    from headwater.act.action import Action
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Mechanism = Callable[["Model"], Mapping[str, float]]
"""From a model to a strength for each of its parts: the scores of any method of `localize`, or `profile`."""
_PAIRS = 16
_SUBJECTS = ("subject", "country", "S", "S2", "asked")
_SHARE = 4  # one in so many parts


def profile(
    model: "Model",
    behavior: "Behavior",
    kinds: tuple[str, ...] = ("attn_out", "mlp_out"),
    position: str | None = None,
    *,
    n: int = _PAIRS,
) -> dict[str, float]:
    """For each part of each layer, how much of the metric comes back when its output of the prompt is put into a run of
    the counterfactual: 0 nothing, 1 all of it (activation patching; Meng et al., 2022).

    position: a named position of the behavior; None means at every token. At most `n` training pairs, of which those
    count whose metric differs between prompt and counterfactual. Raises MethodError where it does for none.
    """
    bound = behavior.train.bind(model)
    name = main_metric(behavior)
    sites = [site for kind in kinds for site in model.sites() if site.kind == kind and not site.stack]
    if not sites:
        raise MethodError(f"{model.name} has no {' or '.join(kinds)}")
    if position is not None and position not in bound.positions:
        raise MethodError("the behavior names no such position", got=position, wanted=", ".join(bound.positions))
    total = {str(site): 0.0 for site in sites}
    apart, left = 0.0, n
    for group in bound.groups:
        some = group[:left]
        left -= len(some)
        if not len(some):
            break
        clean = model.run(some.clean, capture=sites, logits="last")
        corrupt = model.run(some.corrupt, logits="last")

        def total_of(logits: Any, some: Any = some) -> float:
            return float(said(name, logits, some).double().sum())

        start = total_of(corrupt.logits)
        apart += total_of(clean.logits) - start
        where = some.positions[position] if position is not None else None
        for site in track(sites, "patching parts"):
            patched = model.run(some.corrupt, logits="last", interventions=[resample(site, clean, positions=where)])
            total[str(site)] += total_of(patched.logits) - start
    if abs(apart) < 1e-9:
        raise MethodError(f"{name} does not tell prompts of {behavior.name!r} from counterfactuals", fix="Other pairs")
    return {site: value / apart for site, value in total.items()}


def lookup_parts(model: "Model", behavior: "Behavior", k: int | None = None) -> list[str]:
    """The `k` MLPs that restore most of a fact where its subject ends (a quarter of the layers, at most 4, if not
    said): where facts are looked up (Meng et al., 2022; Geva et al., 2023; Guo et al., 2024)."""
    names = json_names(behavior)
    position = next((one for one in _SUBJECTS if one in names), None)
    if position is None:
        raise MethodError(
            "facts are looked up where their subject stands, and the behavior names no such position",
            got=", ".join(names) or "none",
            wanted=f"one of {', '.join(_SUBJECTS)}",
        )
    return _most(model, profile(model, behavior, ("mlp_out",), position), k)


def output_parts(model: "Model", behavior: "Behavior", k: int | None = None) -> list[str]:
    """The `k` attention layers or MLPs that restore most of the output, wherever they act: localization by the output
    alone (causal tracing)."""
    return _most(model, profile(model, behavior), k)


def _most(model: "Model", found: dict[str, float], k: int | None) -> list[str]:
    count = k if k is not None else max(1, min(4, model.n_layers // _SHARE))
    return sorted(found, key=lambda name: -found[name])[:count]


def json_names(behavior: "Behavior") -> list[str]:
    """The positions that the first pair names."""
    import json

    held = json.loads(behavior.frame["positions"][0] or "{}")
    return list(held) if isinstance(held, dict) else []


def before_after(
    model: "Model", action: "Action", behavior: "Behavior", mechanism: Mechanism | None = None
) -> pl.DataFrame:
    """part, before, after, change: the strength of each part with and without an action, strongest before first.

    mechanism: any function from a model to strengths, such as the scores of a method of `localize`; `profile` of the
    behavior if none is given. Known failure: parts that were not needed before may do the work now and have the same
    score; and patching reads the action's prompts only.
    """
    measure: Mechanism = mechanism if mechanism is not None else lambda one: profile(one, behavior)
    before = dict(measure(model))
    with action.on(model):
        after = dict(measure(model))
    if set(before) != set(after):
        raise MethodError("the mechanism has other parts after the action", got=sorted(set(before) ^ set(after))[:4])
    names = sorted(before, key=lambda name: -abs(before[name]))
    rows = {"part": names, "before": [before[name] for name in names], "after": [after[name] for name in names]}
    return pl.DataFrame(rows).with_columns(change=pl.col("after") - pl.col("before"))


def kept(table: pl.DataFrame) -> float:
    """The rank correlation of strengths before and after; NaN where one side is all the same."""
    from scipy.stats import rankdata

    before, after = rankdata(table["before"].to_numpy()), rankdata(table["after"].to_numpy())
    if before.std() == 0 or after.std() == 0:
        return float("nan")
    return float(np.corrcoef(before, after)[0, 1])
