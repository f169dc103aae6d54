"""Which came first: the difference of the steps at which two curves change, with an interval and a null.

    from headwater.dynamics.first import came_first

    came_first(timeline, ("heads", "previous_token max"), ("icl", "repeat"))

As a claim it is the test `came_first` on a context with a `timeline` (one run) or `timelines` (of several seeds).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headwater.claims import Outcome, bootstrap, sign_flip, smallest_p, test
from headwater.core.errors import MethodError
from headwater.dynamics.transitions import LEAST, change_point, split

if TYPE_CHECKING:
    from headwater.claims import Context
    from headwater.dynamics.timeline import Timeline

Floats = NDArray[np.float64]
REAL = 0.05
"""p above which a curve has no transition that could be put in an order."""


def came_first(
    timelines: "Timeline | Sequence[Timeline]",
    first: Sequence[str],
    second: Sequence[str],
    *,
    margin: float = 0.0,
    draws: int = 999,
    seed: int = 0,
) -> Outcome:
    """Whether the curve `first` (measure, name) of a timeline changes more than `margin` steps before `second`.

    effect: step of second minus step of first, by their greatest changes of level (`transitions.change_point`).

    Of one run: lo and hi are the middle 95% of the difference under the posterior of both change points (two levels and
    Gaussian noise each, Jeffreys' prior, any place as likely), p says how often two curves whose changes are at most
    `margin` apart (the likeliest such pair, with the curves' own residuals drawn anew) seem as far apart as these.
    Of several runs, such as seeds: the mean difference, its bootstrap interval over runs, p by sign flips; five runs
    are the fewest that can decide.

    No verdict where a curve of a single run has no clear transition (p above 0.05 against its values in random order).

    Known failure: residuals are taken as independent; of a slow rise they are not, and the interval is too narrow. Then
    the two half-way steps of `transitions` should agree with the order. Coming first is not causing: hold the first
    back (`interventions` of the lab) and see whether the second waits.

    Raises MethodError for curves that were not measured, or are too short.
    """
    names = (_name(first), _name(second))
    several = not hasattr(timelines, "curve")
    runs: list[Any] = list(timelines) if several else [timelines]  # type: ignore[arg-type]
    if not runs or margin < 0 or draws < 1:
        raise MethodError("which came first needs timelines, a margin and draws", got=f"{len(runs)}, {margin}, {draws}")
    pairs = [(_curve(run, names[0], seed), _curve(run, names[1], seed)) for run in runs]
    details: dict[str, Any] = {
        "first": " ".join(names[0]).strip(),
        "second": " ".join(names[1]).strip(),
        "first_steps": [a["step"] for a, _ in pairs],
        "second_steps": [b["step"] for _, b in pairs],
        "runs": len(runs),
    }
    if len(runs) > 1:
        apart = [b["step"] - a["step"] for a, b in pairs]
        found = bootstrap(apart, seed=seed)
        few = smallest_p(pairs=len(runs)) > REAL
        return Outcome(
            effect=found.value, lo=found.lo, hi=found.hi, n=len(runs), reference=margin, details=details,
            p=sign_flip(apart, reference=margin, draws=max(draws, 999), seed=seed),
            why_not=f"{len(runs)} runs are too few to decide" if few else "",
        )  # fmt: skip
    a, b = pairs[0]
    random = np.random.default_rng(seed)
    posterior = _drawn(b, 4000, random) - _drawn(a, 4000, random)
    null = _null(a, b, margin, draws, random)
    effect = b["step"] - a["step"]
    unclear = [str(one["label"]) for one in (a, b) if one["p"] > REAL]
    low, high = np.quantile(posterior, [0.025, 0.975])
    details |= {"transition_p": [a["p"], b["p"]], "half_steps": [a["half"], b["half"]]}
    details["probability"] = float((posterior > margin).mean())
    return Outcome(
        effect=effect, lo=float(min(low, effect)), hi=float(max(high, effect)), reference=margin,
        p=(1 + int((null >= effect - 1e-9).sum())) / (1 + draws),
        n=min(len(a["steps"]), len(b["steps"])), null_draws=tuple(null.tolist()), details=details,
        why_not=f"no clear transition of {' and '.join(unclear)}" if unclear else "",
    )  # fmt: skip


@test("came_first")
def _came_first(
    context: "Context",
    *,
    seed: int,
    first: Sequence[str],
    second: Sequence[str],
    margin: float = 0.0,
    draws: int = 999,
) -> Outcome:
    """See `came_first`; on the context's `timelines`, else its `timeline`."""
    where = context["timelines"] if "timelines" in context else context["timeline"]
    return came_first(where, first, second, margin=margin, draws=draws, seed=seed)


def _name(given: Sequence[str]) -> tuple[str, str]:
    parts = [given] if isinstance(given, str) else list(given)
    if len(parts) not in (1, 2):
        raise MethodError("a curve is a measure and a name", got=parts, wanted='such as ("icl", "repeat")')
    return parts[0], parts[1] if len(parts) == 2 else ""


def _curve(timeline: Any, name: tuple[str, str], seed: int) -> dict[str, Any]:
    """A curve with its change point: steps, values, and what `change_point` gives."""
    table = timeline.curve(*name)
    steps, values = table["step"].to_numpy().astype(np.float64), table["value"].to_numpy()
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    found = change_point(steps.astype(int).tolist(), values.tolist(), seed=seed)
    label = " ".join(name).strip()
    if found is None:
        raise MethodError(
            f"{label} has no change point",
            got=f"{len(values)} values",
            wanted=f"{LEAST} or more that are not all alike",
        )
    return {**found, "steps": steps, "values": values, "label": label}


def _likelihood(curve: dict[str, Any]) -> Floats:
    """[N - 1] log posterior (up to a constant) of a first level of 1, 2, .. N - 1 points."""
    y = curve["values"]
    n = len(y)
    sizes = np.arange(1, n)
    centred = y - y.mean()
    explained = np.cumsum(centred)[:-1] ** 2 * (1 / sizes + 1 / (n - sizes))
    total = float((centred**2).sum())
    rest = np.maximum(total - explained, 1e-12 * total)  # a perfect step leaves nothing
    return -0.5 * np.log(sizes * (n - sizes)) - 0.5 * (n - 2) * np.log(rest)


def _places(curve: dict[str, Any]) -> Floats:
    """[N - 1] the step of a change after 1, 2, .. points: as `change_point` says it."""
    at = curve["steps"]
    return np.sqrt((at[:-1] + 1) * (at[1:] + 1)) - 1


def _drawn(curve: dict[str, Any], draws: int, random: np.random.Generator) -> Floats:
    """[draws] steps of the change under its posterior, anywhere between two checkpoints (evenly in log(1 + step))."""
    log = _likelihood(curve)
    weight = np.exp(log - log.max())
    k = random.choice(len(weight), draws, p=weight / weight.sum())
    low, high = np.log1p(curve["steps"][k]), np.log1p(curve["steps"][k + 1])
    return np.expm1(low + (high - low) * random.random(draws))


def _null(a: dict[str, Any], b: dict[str, Any], margin: float, draws: int, random: np.random.Generator) -> Floats:
    """[draws] differences that are found where the true one is at most `margin`."""
    # a change lies anywhere between two checkpoints: what could be within the margin counts as being so
    apart = b["steps"][None, :-1] - a["steps"][1:, None]
    together = np.where(apart < margin, _likelihood(a)[:, None] + _likelihood(b)[None, :], -np.inf)
    if not np.isfinite(together.max()):
        raise MethodError(
            "these curves could not have changed together", got=f"{b['label']} is measured later than {a['label']}",
            fix="Measure both at the same checkpoints",
        )  # fmt: skip
    i, j = np.unravel_index(int(together.argmax()), together.shape)
    return _again(b, int(j) + 1, draws, random) - _again(a, int(i) + 1, draws, random)


def _again(curve: dict[str, Any], first: int, draws: int, random: np.random.Generator) -> Floats:
    """[draws] change points found in curves that change after `first` points, with this curve's residuals."""
    y = curve["values"]
    own, _ = split(y[None])
    at = np.arange(len(y))
    residuals = y - np.where(at < own[0], y[: own[0]].mean(), y[own[0] :].mean())
    levels = np.where(at < first, y[: own[0]].mean(), y[own[0] :].mean())
    sizes = np.where(at < own[0], own[0], len(y) - own[0])
    residuals = residuals * np.sqrt(sizes / np.maximum(sizes - 1, 1))
    k, _ = split(levels + random.choice(residuals, (draws, len(y))))
    return _places(curve)[k - 1]
