"""Claims about a model's history, and their tests: when it formed, which frequency it needed, whether it follows data.

Tests read the results of the stages `timeline`, `data` and `do_data` from their context: as stored, or, when a run is
verified, as measured again from the checkpoints and the corpus.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

import headwater.data.link_worlds  # noqa: F401  (registers its test with these)
from headwater.claims import Claim, Context, Outcome, bootstrap, p_from_draws, sign_flip, test
from headwater.core.errors import MethodError
from headwater.data.knowing import correlation, crossing, grid, interval, within
from headwater.dynamics.formation import WHATS, halfway, head_curve
from headwater.trace.tests import too_few

if TYPE_CHECKING:
    from headwater.trace.stages import Work

NOT_CHANGED = "the data were not changed to see whether it follows (do_data was not run)"
_ON_RANDOM = ("previous_token", "duplicate_token", "induction")
_WORDS = {"behavior": "the behavior", "circuit": "the circuit"}


def of_history(work: "Work") -> list[Claim]:
    """The claims about the model's history that this run can test."""
    hashes = work.run.hashes()
    claims: list[Claim] = []
    if "formation" in hashes.get("timeline", {}):
        claims += _formed(work)
    if "facts" in hashes.get("data", {}):
        claims += _frequency(work)
    if "link" in hashes.get("data", {}):
        claims += _linked(work)
    if "change" in hashes.get("do_data", {}):
        claims += _followed(work)
    return claims


def _formed(work: "Work") -> list[Claim]:
    formation: Any = work.result("timeline", "formation")
    steps = formation.facts["steps"]
    claims: list[Claim] = []
    for what in WHATS:
        window = formation.window(what)
        if window is None:
            continue
        first, last = window["first"], window["last"]
        params = {"what": what, "first": first, "last": last, "threshold": 0.5}
        claims.append(Claim(
            id=f"formed-{what}", test="formed_between", stage="timeline", params=params,
            statement=f"Most of {_WORDS[what]} formed between step {first} and step {last} of {steps[-1]}",
        ))  # fmt: skip
    halves = {what: window["half"] for what in WHATS if (window := formation.window(what)) is not None}
    if len(halves) == 2:
        earlier, later = sorted(WHATS, key=lambda what: halves[what])
        claims.append(Claim(
            id="formed-order", test="formed_first", stage="timeline",
            params={"first": [earlier], "second": [later], "draws": work.settings.timeline.draws},
            statement=f"{_WORDS[earlier].capitalize()} formed before {_WORDS[later]}",
        ))  # fmt: skip
    made = work.result("timeline", "timeline")
    if "behavior" in halves and "heads" in work.settings.timeline.measures:
        for role in work.heads.found:
            if role not in _ON_RANDOM:
                continue
            group = [list(head) for head in work.heads.heads_of(role)]
            before = halfway(*head_curve(made, role, group)) <= halves["behavior"]
            pair = [["heads", role, group], ["behavior"]]
            first, second = pair if before else pair[::-1]
            named = ", ".join(f"a{layer}.h{head}" for layer, head in group)
            claims.append(Claim(
                id=f"formed-{role.replace('_', '-')}", test="formed_first", stage="timeline",
                params={"first": first, "second": second, "draws": work.settings.timeline.draws},
                statement=f"The {role.replace('_', ' ')} attention of {named} formed {'before' if before else 'after'} "
                "the behavior",
            ))  # fmt: skip
    return claims


def _frequency(work: "Work") -> list[Claim]:
    link, draws = work.result("data", "facts"), work.settings.data.draws
    name = work.behavior.name
    claims = [
        Claim(
            id="frequency-known", test="frequency_tells_known", stage="data", params={"draws": draws},
            statement=f"Which facts of {name} the model knows is told by how often subject and object had stood "
            "together in what it had read",
        ),
        Claim(
            id="frequency-pair", test="pair_above_parts", stage="data", params={"draws": draws},
            statement="How often the pair had stood together tells it better than how often its subject, or its "
            "object, had been read",
        ),
    ]  # fmt: skip
    threshold = found_threshold(link.tables["facts"])
    if threshold is not None:
        claims.append(Claim(
            id="frequency-threshold", test="known_above_threshold", stage="data",
            params={"threshold": threshold, "draws": draws},
            statement=f"A fact is known from about {threshold:.0f} co-occurrences on: more of the facts above are "
            "known than of those below, at the same step",
        ))  # fmt: skip
    return claims


def _linked(work: "Work") -> list[Claim]:
    draws = {"draws": work.settings.data.draws}
    return [
        Claim(
            id="link-causality", test="link_above_null", stage="data", params=draws,
            statement="Over relations and checkpoints, how causal a relation's linear mechanism is goes with how often "
            "its subjects and objects had been read together",
        ),
        Claim(
            id="link-pair", test="link_pair_above_parts", stage="data", params=draws,
            statement="It goes with how often the pairs had been read together more than with how often their "
            "subjects, or their objects, had been read",
        ),
    ]  # fmt: skip


def _followed(work: "Work") -> list[Claim]:
    facts = work.run.facts("do_data")
    worlds = "worlds" in work.run.hashes()["do_data"]
    if facts["how"] == "permute":
        done = "the frequencies of the facts are dealt out anew and all else is trained as before"
    else:
        done = (
            f"what states {len(facts.get('removed', ()))} of the facts is taken out and all else is trained as before"
        )
    return [
        Claim(
            id="do-data", test="knowledge_follows_data", stage="do_data", params={"draws": work.settings.data.draws},
            statement=f"do(data): when {done}, what the model knows changes with how often it was said",
        ),
        *([Claim(
            id="do-data-relations", test="counterfactual_pretraining", stage="do_data", params={"reference": 0.0},
            statement="do(data): with it changes how causal each relation's linear mechanism is",
        )] if worlds else []),
    ]  # fmt: skip


# --- when


@test("formed_between")
def formed_between(context: Context, *, seed: int, what: str, first: int, last: int, threshold: float) -> Outcome:
    """The share of the change over all of training that lies between two checkpoints, on test pairs, against a
    threshold: sign flips of gain - threshold x whole gain, pair by pair. Its null: the shares that stretches of as
    many checkpoints hold that have no checkpoint's gain in common with this one."""
    steps, values = context["formation"].values(what, "test")
    at = {int(step): i for i, step in enumerate(steps)}
    if first not in at or last not in at:
        raise MethodError("no such checkpoints in this timeline", got=f"{first}, {last}", wanted=f"of {list(at)}")
    i, j = at[first], at[last]
    gain, whole = values[j] - values[i], values[-1] - values[0]
    total = float(whole.mean())
    if abs(total) < 1e-12:
        return Outcome(effect=float("nan"), n=len(whole), reference=threshold, why_not=f"{_WORDS[what]} did not change")
    found = bootstrap(gain, whole, statistic=_ratio, seed=seed, method="percentile")
    width, curve = j - i, values.mean(axis=1)
    null = tuple(
        float((curve[k + width] - curve[k]) / total)
        for k in range(len(steps) - width)
        if k + width <= i or k >= j
    )  # fmt: skip
    sure = bootstrap(whole, seed=seed)
    why = too_few(pairs=len(whole)) or ("" if sure.lo > 0 else f"{_WORDS[what]} did not clearly form on these pairs")
    return Outcome(
        effect=found.value, lo=found.lo, hi=found.hi, p=sign_flip(gain - threshold * whole, seed=seed), n=len(whole),
        reference=threshold, null_draws=null, why_not=why, details={"checkpoints": width},
    )  # fmt: skip


def _ratio(gain: Any, whole: Any, axis: int = -1) -> Any:
    below = whole.mean(axis)
    return gain.mean(axis) / np.where(np.abs(below) < 1e-12, np.nan, below)


class _Curves:
    """Curves by name, for `came_first`: behavior and circuit on test pairs, the mean attention of a group of heads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.groups: dict[str, tuple[str, list[list[int]]]] = {}

    def curve(self, measure: str, name: str = "") -> pl.DataFrame:
        if measure in WHATS:
            steps, values = self._context["formation"].values(measure, "test")
            mean = values.mean(axis=1)
        else:
            steps, mean = head_curve(self._context["timeline"], *self.groups[name])
        return pl.DataFrame({"step": steps.astype(int), "value": mean})


@test("formed_first")
def formed_first(context: Context, *, seed: int, first: list[Any], second: list[Any], draws: int) -> Outcome:
    """Whether one curve changed before another (`headwater.dynamics.first.came_first`), of: ["behavior"], ["circuit"]
    (means over test pairs), ["heads", role, heads] (their mean attention to the role's place on random tokens).

    Which is to be first was read off curves of the same checkpoints, and of heads off the very curve that is tested: so
    p counts both orders (twice the one-sided one).
    """
    from headwater.dynamics.first import came_first

    curves, names = _Curves(context), list[tuple[str, str]]()
    for one in (first, second):
        if one[0] == "heads":
            curves.groups[one[1]] = (one[1], one[2])
        names.append((one[0], one[1] if len(one) > 1 else ""))
    try:
        found = came_first(curves, names[0], names[1], draws=draws, seed=seed)  # type: ignore[arg-type]
        return replace(found, p=None if found.p is None else min(1.0, 2 * found.p))
    except MethodError as error:
        return Outcome(effect=float("nan"), why_not=f"{error.what} ({error.got})")


# --- which frequency


def found_threshold(table: pl.DataFrame) -> float | None:
    """The count at which half of the train facts are known; None where more is not better."""
    found = grid(table)
    if not found.train.any():
        return None
    value, _ = crossing(found.known[found.train], found.counts["pair"][found.train])
    return round(value, 1) if np.isfinite(value) and value < 1e12 else None


def _changed(context: Context) -> str:
    return "" if "fact_change" in context else NOT_CHANGED


@test("frequency_tells_known")
def frequency_tells_known(context: Context, *, seed: int, draws: int) -> Outcome:
    """Area under the ROC curve of the pair's count for what is known, between test facts of the same step, against
    counts dealt out anew among them. Without do(data) it decides nothing."""
    found = grid(context["fact_link"].tables["facts"])
    known, pair = found.known[~found.train], found.counts["pair"][~found.train]
    random = np.random.default_rng(seed)
    auc = within(known, pair)
    null = np.array([within(known, random.permutation(pair)) for _ in range(draws)])
    again = [
        within(known[rows], pair[rows]) for rows in (random.integers(0, len(known), len(known)) for _ in range(500))
    ]
    lo, hi = interval(again)
    if not np.isfinite(auc):
        return Outcome(effect=auc, n=len(known), reference=0.5, why_not="all of the test facts are known alike")
    null = null[np.isfinite(null)]
    return Outcome(
        effect=auc, lo=lo, hi=hi, p=p_from_draws(auc, null), n=len(known), reference=0.5,
        null_draws=tuple(null.tolist()), why_not=too_few(draws=draws) or _changed(context),
    )  # fmt: skip


@test("pair_above_parts")
def pair_above_parts(context: Context, *, seed: int, draws: int) -> Outcome:
    """The same area for the pair's count minus that of the better of its subject's and object's, test facts resampled
    (p: how often the difference is not above 0, the observed one counted). Without do(data) it decides nothing."""
    found = grid(context["fact_link"].tables["facts"])
    known = found.known[~found.train]
    counts = {name: values[~found.train] for name, values in found.counts.items()}

    def ahead(rows: Any) -> float:
        areas = {name: within(known[rows], values[rows]) for name, values in counts.items()}
        return areas["pair"] - np.nanmax([areas["subject"], areas["object"], 0.5])

    random = np.random.default_rng(seed)
    n = len(known)
    effect = ahead(slice(None))
    again = np.array([ahead(random.integers(0, n, n)) for _ in range(max(draws, 199))])
    again = again[np.isfinite(again)]
    if not np.isfinite(effect) or not len(again):
        return Outcome(effect=float("nan"), n=n, why_not="all of the test facts are known alike")
    lo, hi = interval(again.tolist())
    p = (1 + int((again <= 0).sum())) / (1 + len(again))
    areas = {name: within(known, values) for name, values in counts.items()}
    return Outcome(effect=effect, lo=lo, hi=hi, p=p, n=n, why_not=_changed(context), details={"auc": areas})


@test("known_above_threshold")
def known_above_threshold(context: Context, *, seed: int, threshold: float, draws: int) -> Outcome:
    """Share known of the test facts seen at least `threshold` times minus that of the others, between facts of the same
    step, against counts dealt out anew. Without do(data) it decides nothing."""
    found = grid(context["fact_link"].tables["facts"])
    known, pair = found.known[~found.train], found.counts["pair"][~found.train]

    def apart(y: Any, x: Any) -> float:
        above = x >= threshold
        n = above.sum(axis=0)
        split = (n > 0) & (n < len(y))
        if not split.any():
            return float("nan")
        y, above, n = y[:, split], above[:, split], n[split]
        difference = (y * above).sum(axis=0) / n - (y * ~above).sum(axis=0) / (len(y) - n)
        weight = n * (len(y) - n)
        return float((difference * weight).sum() / weight.sum())

    random = np.random.default_rng(seed)
    effect = apart(known, pair)
    n = len(known)
    if not np.isfinite(effect):
        return Outcome(effect=effect, n=n, why_not="no step has test facts on both sides of the threshold")
    null = np.array([apart(known, random.permutation(pair)) for _ in range(draws)])
    rows = [random.integers(0, n, n) for _ in range(500)]
    lo, hi = interval([apart(known[some], pair[some]) for some in rows])
    return Outcome(
        effect=effect, lo=lo, hi=hi, p=p_from_draws(effect, null[np.isfinite(null)]), n=n,
        null_draws=tuple(null[np.isfinite(null)].tolist()), why_not=too_few(draws=draws) or _changed(context),
    )  # fmt: skip


def _points(context: Context) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """(causality [R, S], counts by what [R, S]) of the relations at the steps of the link."""
    table = context["link"].tables["points"].filter(pl.col("subjects") == "all").sort("relation", "step")
    n = table["relation"].n_unique()

    def of(name: str) -> np.ndarray[Any, Any]:
        return table[name].cast(pl.Float64).to_numpy().reshape(n, -1)

    return of("causality"), {name: of(name) for name in ("pair", "subject", "object")}


@test("link_above_null")
def link_above_null(context: Context, *, seed: int, draws: int) -> Outcome:
    """Correlation over relations and checkpoints of causality with the log count of the pairs, against the relations'
    counts (with their whole history) dealt out anew among them: what both owe to the step alone is in the null too.
    Without do(data) it decides nothing."""
    strength, counts = _points(context)
    r, n = correlation(counts["pair"].reshape(-1), strength.reshape(-1)), len(strength)
    if not np.isfinite(r):
        return Outcome(effect=r, n=n, why_not="no relation's mechanism varies")
    random = np.random.default_rng(seed)
    null = [correlation(random.permutation(counts["pair"]).reshape(-1), strength.reshape(-1)) for _ in range(draws)]
    rows = [random.integers(0, n, n) for _ in range(500)]
    lo, hi = interval([correlation(counts["pair"][some].reshape(-1), strength[some].reshape(-1)) for some in rows])
    return Outcome(
        effect=r, lo=lo, hi=hi, p=p_from_draws(r, null), n=n, reference=float(np.mean(null)), null_draws=tuple(null),
        why_not=too_few(draws=draws) or _changed(context),
    )  # fmt: skip


@test("link_pair_above_parts")
def link_pair_above_parts(context: Context, *, seed: int, draws: int) -> Outcome:
    """That correlation minus the larger of those with the subjects' and the objects' own counts, relations resampled
    (p: how often the difference is not above 0, the observed one counted). Without do(data) it decides nothing."""
    strength, counts = _points(context)

    def ahead(rows: Any) -> float:
        found = {name: correlation(x[rows].reshape(-1), strength[rows].reshape(-1)) for name, x in counts.items()}
        return found["pair"] - max(found["subject"], found["object"])

    n, random = len(strength), np.random.default_rng(seed)
    effect = ahead(slice(None))
    if not np.isfinite(effect):
        return Outcome(effect=effect, n=n, why_not="no relation's mechanism varies")
    again = [one for _ in range(draws) if np.isfinite(one := ahead(random.integers(0, n, n)))]
    lo, hi = interval(again)
    p = (1 + sum(one <= 0 for one in again)) / (1 + len(again))
    return Outcome(effect=effect, lo=lo, hi=hi, p=p, n=n, why_not=too_few(draws=draws) or _changed(context))


# --- do(data)


@test("knowledge_follows_data")
def knowledge_follows_data(context: Context, *, seed: int, draws: int) -> Outcome:
    """Correlation over the test facts of the change of the log count with the change of how early each was known,
    between a training and the same training on other data, against changes dealt out anew."""
    table = context["fact_change"].tables["facts"].filter(pl.col("split") == "test")
    x, y = table["change_count"].to_numpy(), table["change_known"].to_numpy()
    r, n = correlation(x, y), len(x)
    if not np.isfinite(r):
        return Outcome(effect=r, n=n, why_not="neither what was said nor what is known changed")
    random = np.random.default_rng(seed)
    null = np.array([correlation(random.permutation(x), y) for _ in range(draws)])
    rows = [random.integers(0, n, n) for _ in range(500)]
    lo, hi = interval([correlation(x[some], y[some]) for some in rows])
    return Outcome(
        effect=r, lo=lo, hi=hi, p=p_from_draws(r, null), n=n, null_draws=tuple(null.tolist()),
        why_not=too_few(draws=draws), details={"moved": int((np.abs(x) > 1e-9).sum())},
    )  # fmt: skip
