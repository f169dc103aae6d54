"""When something formed: curves over the checkpoints, pair by pair, and the steps between which they rose.

Steps are compared on the scale log(1 + step), on which checkpoints are spaced. Shapes: S steps, n pairs.
"""

from typing import Any, ClassVar, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.claims.statistics import bootstrap
from headwater.core.results import Result, register_result

Floats = NDArray[np.float64]
WHATS = ("behavior", "circuit")


@register_result
class Formation(Result):
    """When a behavior, and the circuit behind it, formed.

    `tables["curves"]`: step, what ("behavior": metric on the prompt minus on the counterfactual; "circuit": the same
    with only the final circuit's edges carrying the prompt; "known": share of prompts whose answer is the likeliest
    token of all), split, value, lo, hi (95%, over pairs), n; the first two as shares of the last step's behavior.
    `tables["windows"]`: what, first, last: the checkpoints between which, on train pairs, most of the change happened
    (the shortest such stretch on the scale log(1 + step)), held (the share of the change there, train), share (as
    asked), half (the step at which the curve has gone half its way). `tables["pairs"]`: step, id, split, whole, part
    (as above, in units of the metric), known. Facts: metric, steps.
    """

    kind: ClassVar[str] = "formation"
    main: ClassVar[str | None] = "curves"

    def values(self, what: str, split: str) -> tuple[Floats, Floats]:
        """(steps [S], values [S, n]) of single pairs, in units of the metric."""
        column = {"behavior": "whole", "circuit": "part", "known": "known"}[what]
        table = self.tables["pairs"].filter(pl.col("split") == split).sort("step", "id")
        steps = table["step"].unique().sort().to_numpy().astype(float)
        return steps, table[column].cast(pl.Float64).to_numpy().reshape(len(steps), -1)

    def window(self, what: str) -> dict[str, Any] | None:
        """The row of `windows`, or None where nothing formed."""
        found = self.tables["windows"].filter(pl.col("what") == what).to_dicts()
        return found[0] if found else None


def curves(result: Formation, *, seed: int) -> pl.DataFrame:
    """The means over pairs, with intervals, as shares of what the behavior comes to at the last step."""
    rows: list[dict[str, Any]] = []
    for split in ("train", "test"):
        _, whole = result.values("behavior", split)
        end = abs(float(whole[-1].mean())) or 1.0
        for what in (*WHATS, "known"):
            steps, values = result.values(what, split)
            scale = 1.0 if what == "known" else end
            for step, of_step in zip(steps.tolist(), values, strict=True):
                mean = bootstrap(of_step / scale, draws=500, seed=seed)
                rows.append({
                    "step": int(step), "what": what, "split": split, "value": mean.value, "lo": mean.lo, "hi": mean.hi,
                    "n": len(of_step),
                })  # fmt: skip
    return pl.DataFrame(rows)


def windows(result: Formation, share: float) -> pl.DataFrame:
    """Between which checkpoints behavior and circuit formed, on train pairs; none of what did not form."""
    rows: list[dict[str, Any]] = []
    for what in WHATS:
        steps, values = result.values(what, "train")
        curve = values.mean(axis=1)
        found = shortest(steps, curve, share)
        if found is not None:
            i, j = found
            rows.append({
                "what": what, "first": int(steps[i]), "last": int(steps[j]), "share": share,
                "held": float((curve[j] - curve[i]) / (curve[-1] - curve[0])), "half": halfway(steps, curve),
            })  # fmt: skip
    schema: dict[str, Any] = {
        "what": pl.String, "first": pl.Int64, "last": pl.Int64, "share": pl.Float64, "held": pl.Float64,
        "half": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def shortest(steps: Floats, curve: Floats, share: float) -> tuple[int, int] | None:
    """The checkpoints i < j nearest to each other in log(1 + step) with `share` of the change from the first to the
    last between them; None for a curve that does not rise."""
    gain = float(curve[-1] - curve[0])
    if not np.isfinite(gain) or gain <= 0:
        return None
    at = np.log1p(steps)
    fits = [
        (float(at[j] - at[i]), i, j)
        for i in range(len(at))
        for j in range(i + 1, len(at))
        if curve[j] - curve[i] >= share * gain
    ]
    return min(fits)[1:] if fits else None


def halfway(steps: Floats, curve: Floats) -> float:
    """The first step at which a curve has gone half the way from its first value to its last; read in straight lines
    on the scale log(1 + step). NaN for one that does not rise."""
    level = (float(curve[0]) + float(curve[-1])) / 2
    if not curve[-1] > curve[0]:
        return float("nan")
    at = np.log1p(steps)
    j = int(np.argmax(curve >= level))
    if j == 0:
        return float(steps[0])
    part = (level - curve[j - 1]) / (curve[j] - curve[j - 1])
    return float(np.expm1(at[j - 1] + part * (at[j] - at[j - 1])))


def head_curve(made: Result, role: str, heads: list[list[int]]) -> tuple[Floats, Floats]:
    """(steps, mean attention of these heads to the place of their role on random tokens [S]) from a timeline."""
    names = [f"{role} a{layer}.h{head}" for layer, head in heads]
    table = made.tables["values"].filter((pl.col("measure") == "heads") & pl.col("name").is_in(names))
    mean = table.group_by("step").agg(pl.col("value").mean()).sort("step")
    return mean["step"].to_numpy().astype(float), cast(Floats, mean["value"].to_numpy())
