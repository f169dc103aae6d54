"""The frequency link: how strong a mechanism is against how often the model had read what it is about.

    strengths = relation_strengths("runs/world", relations, out="link/strengths")
    counts = counts_for(strengths, "runs/world", relations, out="link/counts")
    found = frequency_link(strengths, counts)

Merullo et al. (2025) found that linear relations form where subject and object of its facts stood together often
enough. Points are relations at checkpoints; what is resampled are relations.
"""

import itertools
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.methods import configured
from headwater.core.results import Provenance, Result, register_result
from headwater.data.corpus import Corpus
from headwater.data.counts import Counts, count
from headwater.data.link_stats import Estimate, Groups, correlations, estimate, logistic, ridge_held_out
from headwater.data.link_strengths import SLICES, StrengthConfig, Strengths, relation_strengths
from headwater.data.relations import Relation

Floats = NDArray[np.float64]
WHATS = ("causality", "accuracy", "log_prob", "faithfulness", "said_causality")
COUNTS = ("pair", "subject", "object")
_LEAST = 5
"""Facts that a relation needs once those that another relation shares are left out."""
_BIN = 0.5
_CORRELATIONS: dict[str, Any] = {
    "strength": pl.String, "counts": pl.String, "subjects": pl.String, "steps": pl.String, "facts": pl.String,
    "r": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "less": pl.Float64, "less_lo": pl.Float64,
    "less_hi": pl.Float64, "points": pl.Int64, "relations": pl.Int64,
}  # fmt: skip
_THRESHOLDS: dict[str, Any] = {
    "strength": pl.String, "level": pl.Float64, "n": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
    "seen": pl.Float64, "within": pl.Boolean,
}  # fmt: skip
_PREDICTIONS: dict[str, Any] = {
    "predictor": pl.String, "steps": pl.String, "within": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
    "twice": pl.Float64, "error": pl.Float64, "more": pl.Float64, "more_lo": pl.Float64, "more_hi": pl.Float64,
    "n": pl.Int64,
}  # fmt: skip
_OVERLAPS: dict[str, Any] = {
    "relation": pl.String, "other": pl.String, "shared": pl.Int64, "share": pl.Float64, "flagged": pl.Boolean,
    "n_shared": pl.Float64, "n_own": pl.Float64,
}  # fmt: skip
# What tells how often a pair was seen: of a fact, and of its relation at that checkpoint (mean_).
_PREDICTORS: dict[str, tuple[str, ...]] = {
    "mean": (),
    "accuracy": ("right", "mean_right"),
    "log_prob": ("log_prob", "mean_log_prob"),
    "log_prob and LRE": ("log_prob", "mean_log_prob", "mean_causal", "faithful", "mean_faithful"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """How strengths are held against counts.

    levels: of causality and accuracy, whose counts are asked for. overlap: share of a relation's facts that another
    shares from which on the two are flagged. draws: resamples of relations.
    """

    levels: tuple[float, ...] = (0.5, 0.9)
    overlap: float = 0.1
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise MethodError("levels are shares", got=list(self.levels), wanted="between 0 and 1")
        if not 0 < self.overlap <= 1 or self.draws < 10:
            got = f"overlap {self.overlap}, draws {self.draws}"
            raise MethodError("the link's settings do not fit", got=got, wanted="0 < overlap <= 1, draws >= 10")


@register_result
class LinkResult(Result):
    """Strength of mechanisms against counts. Counts are means over the judged facts of log10(1 + n).

    `tables["points"]`: step, relation, subjects, n (facts), pair, subject, object (counts), and the strengths.
    `tables["correlations"]`: strength, counts ("pair": together; "subject", "object": alone), subjects, steps ("all" or
    "last"), facts ("all", or "own": without those that a flagged relation shares), r (Pearson) with its interval over
    relations (lo, hi), less (how much less than that of "pair", with its own interval), points, relations.
    `tables["thresholds"]`: strength, level, n (times together at which a logistic curve over all points reaches it),
    lo, hi, seen (the most that any relation was seen, on average), within (whether n is no more than that).
    `tables["predictions"]`: how often a pair was seen, from the model alone, each relation predicted from the others:
    predictor, steps, within (share predicted within ten times), its interval, twice (within two times), error (mean
    absolute, in log10), more (error less than that of log_prob, with its interval), n. Of facts seen at least once.
    `tables["overlaps"]`: relation, other, shared (facts of `relation` of which lines of `other` count as well), share,
    flagged, n_shared and n_own (median times together, last step).
    `tables["facts"]`: bins of n at the last step: low, high, n (facts), accuracy, log_prob, causality (of edits towards
    a fact of the bin). `tables["fact_correlations"]`: r over facts and steps of log10(1 + n) with `right`, `log_prob`
    and `causal` (an edit towards the fact).
    Facts: r, lo, hi (pair against causality), relations, steps, flagged.
    """

    kind: ClassVar[str] = "frequency_link"
    main: ClassVar[str | None] = "correlations"

    def value(self, strength: str = "causality", counts: str = "pair", **where: str) -> Estimate:
        """r with its interval; where: subjects, steps, facts ("all" where not said)."""
        for name, given in (("strength", strength), ("counts", counts)):
            known = self.tables["correlations"][name].unique().to_list()
            if given not in known:
                raise MethodError(f"no such {name} in the link", got=repr(given), wanted=did_you_mean(given, known))
        table = self.tables["correlations"].filter(pl.col("strength") == strength, pl.col("counts") == counts)
        for name in ("subjects", "steps", "facts"):
            table = table.filter(pl.col(name) == where.get(name, "all"))
        if not table.height:
            raise MethodError("no such correlation in the link", got=where)
        row = table.row(0, named=True)
        return Estimate(row["r"], row["lo"], row["hi"])


def counts_for(
    steps: Strengths | Iterable[int],
    corpus: Any,
    relations: Iterable[Relation] | Mapping[str, Relation],
    *,
    out: str | Path | None = None,
    separator: int | None = None,
    **options: Any,
) -> Counts:
    """How often subjects and objects of relations stood in a corpus, cut at the steps of checkpoints.

    corpus: as `count` takes it; a run's folder is rebuilt batch by batch. separator: the token that parts documents;
    where the corpus' tokenizer has a token for a line's end it is that one. options: those of `count`.
    """
    corpus = Corpus.open(corpus)
    tokenizer = getattr(corpus, "tokenizer", None)
    if separator is None and tokenizer is not None:
        separator = tokenizer.get_vocab().get("\n")
    cuts = sorted({0, *(steps.steps if isinstance(steps, Strengths) else steps)})
    if len(cuts) < 2:
        raise MethodError("counts need a checkpoint after step 0", got=cuts)
    wanted = list(relations.values()) if isinstance(relations, Mapping) else list(relations)
    pairs = list(dict.fromkeys(pair for one in wanted for pair in one.samples))
    if corpus.form == "tokens":
        options["separator"] = separator
    return count(corpus, pairs, ranges=tuple(cuts), out=out, **options)


def link(
    run: Any,
    relations: Iterable[Relation] | Mapping[str, Relation],
    *,
    corpus: Any = None,
    out: str | Path | None = None,
    steps: Iterable[int] | None = None,
    strengths: StrengthConfig | None = None,
    counting: Mapping[str, Any] | None = None,
    config: LinkConfig | None = None,
) -> LinkResult:
    """Measure, count and relate: `relation_strengths`, `counts_for` and `frequency_link` of a run, resumable in `out`.

    run: a run's folder, or any checkpoints with `corpus` for what they saw. counting: options of `counts_for`.
    """
    folder = Path(out) if out is not None else None
    place = {name: folder / name if folder is not None else None for name in ("strengths", "counts")}
    wanted = list(relations.values()) if isinstance(relations, Mapping) else list(relations)
    made = relation_strengths(run, wanted, out=place["strengths"], steps=steps, config=strengths)
    counts = counts_for(made, run if corpus is None else corpus, wanted, out=place["counts"], **(counting or {}))
    found = frequency_link(made, counts, config=config)
    if folder is not None:
        made.save(folder / "measured")
        found.save(folder / "link")
    return found


def frequency_link(
    strengths: Strengths, counts: Counts, *, config: LinkConfig | None = None, **options: Any
) -> LinkResult:
    """Relate the strength of mechanisms to how often their facts had been read. Options are those of `LinkConfig`.

    counts: with a cut at each step of the strengths, as `counts_for` gives them. Raises MethodError where they lack a
    fact or a step, or where there are fewer than three relations.

    Known failure: over checkpoints both grow, so a correlation over all of them says little unless it also holds at the
    last one and above that with the subject's or the object's own counts; and a correlation is no cause: that is what
    `compare_worlds` asks. Together is not said: facts that another relation's lines raise are flagged, not mended.
    """
    started = time.monotonic()
    config = configured(LinkConfig, config, options)
    facts = seen(strengths, counts)
    overlaps, shared = _overlaps(facts, config)
    if len(strengths.facts["relations"]) < 3:
        raise MethodError("a link needs three relations or more", got=strengths.facts["relations"])
    points = points_of(facts)
    flagged = overlaps.filter(pl.col("flagged"))
    own = facts.join(shared, on=["relation", "subject", "object"], how="anti")
    correlated = _correlated(points, "all", config)
    if flagged.height:
        enough = points_of(own).filter(pl.col("n") >= _LEAST)
        correlated += [row for row in _correlated(enough, "own", config) if row["subjects"] == "all"]
    tables = {
        "points": points,
        "correlations": pl.DataFrame(correlated, schema=_CORRELATIONS),
        "thresholds": pl.DataFrame(_thresholds(points, config), schema=_THRESHOLDS),
        "predictions": pl.DataFrame(_predictions(facts, config), schema=_PREDICTIONS),
        "overlaps": overlaps,
        "facts": bins(facts.filter(pl.col("step") == strengths.steps[-1])),
        "fact_correlations": pl.DataFrame(_fact_correlations(facts, config)),
    }
    result = LinkResult(tables=tables, config=asdict(config))
    r = result.value()
    result.facts = {
        "r": r.value, "lo": r.lo, "hi": r.hi, "relations": strengths.facts["relations"], "steps": strengths.steps,
        "flagged": [f"{row['relation']} / {row['other']}" for row in flagged.to_dicts()],
        "scope": counts.facts.get("scope"),
    }  # fmt: skip
    result.provenance = Provenance.collect(seed=config.seed, seconds=time.monotonic() - started)
    return result


def seen(strengths: Strengths, counts: Counts) -> pl.DataFrame:
    """The facts of the strengths with n_pair, n_subject and n_object as the checkpoint of each step had seen them, and
    log_pair, log_subject, log_object: log10(1 + n)."""
    parts: list[pl.DataFrame] = []
    for (step,), facts in strengths.tables["facts"].group_by(["step"], maintain_order=True):
        at = int(step) if isinstance(step, int | float) else 0
        pairs, terms = _by(counts, at, "pairs"), _by(counts, at, "terms")
        one = facts.join(pairs.select("subject", "object", n_pair="n"), on=["subject", "object"], how="left")
        one = one.join(terms.select(subject="term", n_subject="n"), on="subject", how="left")
        one = one.join(terms.select(object="term", n_object="n"), on="object", how="left")
        if one.select(pl.any_horizontal(pl.col("n_pair", "n_subject", "n_object").is_null().any())).item():
            missing = one.filter(pl.col("n_pair").is_null()).select("subject", "object").head(1).rows()
            raise MethodError("a fact was not counted", got=missing, fix="Count the pairs of these relations")
        parts.append(one)
    if not parts:
        raise MethodError("strengths without facts", got=strengths.facts)
    logs = [(pl.col(f"n_{name}") + 1).log10().alias(f"log_{name}") for name in COUNTS]
    return pl.concat(parts).with_columns(logs)


def _by(counts: Counts, step: int, table: str) -> pl.DataFrame:
    """What the checkpoint of a step had seen; of step 0: nothing."""
    if step > 0:
        return counts.by(step, table)
    names = ["term"] if table == "terms" else ["subject", "object"]
    return counts.tables[table].select(names).unique(maintain_order=True).with_columns(n=pl.lit(0, dtype=pl.Int64))


def points_of(facts: pl.DataFrame) -> pl.DataFrame:
    """Relations at steps, by slice of subjects: means over the judged facts."""
    judged = facts.filter(pl.col("role") == "test")
    slices = {"all": pl.lit(True), "single": pl.col("tokens") == 1, "several": pl.col("tokens") > 1}
    means = {
        **{name: f"log_{name}" for name in COUNTS}, "causality": "causal", "accuracy": "right", "log_prob": "log_prob",
        "faithfulness": "faithful", "said_causality": "said",
    }  # fmt: skip
    parts = [
        judged.filter(slices[one])
        .group_by(["step", "relation"], maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("n"), *(pl.col(c).cast(pl.Float64).mean().alias(k) for k, c in means.items())
        )
        .with_columns(subjects=pl.lit(one))
        for one in SLICES
    ]
    return pl.concat(parts).select("step", "relation", "subjects", "n", *means)


def bins(facts: pl.DataFrame) -> pl.DataFrame:
    """Facts by how often their pair was seen, in steps of half a power of ten: low, high, n, accuracy, log_prob,
    causality (of edits towards them)."""
    place = (pl.col("log_pair") / _BIN).floor()
    table = facts.group_by(place.alias("bin")).agg(
        pl.len().cast(pl.Int64).alias("n"),
        pl.col("right").cast(pl.Float64).mean().alias("accuracy"),
        pl.col("log_prob").mean(),
    )
    aimed = _aimed(facts).group_by(place.alias("bin")).agg(pl.col("causal").cast(pl.Float64).mean().alias("causality"))
    table = table.join(aimed, on="bin", how="left")
    low, high = (10 ** (pl.col("bin") * _BIN) - 1).alias("low"), (10 ** ((pl.col("bin") + 1) * _BIN) - 1).alias("high")
    return table.sort("bin").select(low, high, "n", "accuracy", "log_prob", "causality")


def _aimed(facts: pl.DataFrame) -> pl.DataFrame:
    """A row an edit: causal, with the counts of the fact that it was aimed at."""
    edits = facts.filter(pl.col("role") == "test").select("step", "relation", "causal", subject="target")
    targets = facts.filter(pl.col("role") == "test").drop("causal")
    return edits.join(targets, on=["step", "relation", "subject"])


def _correlated(points: pl.DataFrame, facts: str, config: LinkConfig) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    last = points["step"].max()
    for subjects, steps in itertools.product(SLICES, ("all", "last")):
        part = points.filter(pl.col("subjects") == subjects, (pl.col("step") == last) | (steps == "all"))
        if not part.height:
            continue
        groups = Groups(part["relation"].to_numpy(), draws=config.draws, seed=config.seed)
        for strength in WHATS:
            y = part[strength].to_numpy()
            drawn = {one: correlations(part[one].to_numpy(), y, groups) for one in COUNTS}
            for one in COUNTS:
                r, less = estimate(drawn[one]), estimate(drawn["pair"] - drawn[one])
                where = {"strength": strength, "counts": one, "subjects": subjects, "steps": steps, "facts": facts}
                rows.append({
                    **where, "r": r.value, "lo": r.lo, "hi": r.hi, "less": less.value, "less_lo": less.lo,
                    "less_hi": less.hi, "points": part.height, "relations": len(groups.names),
                })  # fmt: skip
    return rows


def _thresholds(points: pl.DataFrame, config: LinkConfig) -> list[dict[str, Any]]:
    part = points.filter(pl.col("subjects") == "all")
    groups = Groups(part["relation"].to_numpy(), draws=config.draws, seed=config.seed)
    x, weight = part["pair"].to_numpy(), part["n"].to_numpy().astype(np.float64)
    most = float(x.max())
    rows: list[dict[str, Any]] = []
    for strength in ("causality", "accuracy"):
        curve = logistic(x, part[strength].to_numpy(), weight, groups)
        for level in config.levels:
            with np.errstate(divide="ignore", invalid="ignore"):
                where = (np.log(level / (1 - level)) - curve[:, 0]) / curve[:, 1]
            where[curve[:, 1] <= 0] = np.nan  # it does not rise: no count reaches the level
            at = estimate(np.clip(where, 0, 12))
            n, lo, hi = (10**value - 1 for value in at)
            rows.append({
                "strength": strength, "level": level, "n": n, "lo": lo, "hi": hi, "seen": 10**most - 1,
                "within": bool(np.isfinite(at.value) and at.value <= most),
            })  # fmt: skip
    return rows


def _predictions(facts: pl.DataFrame, config: LinkConfig) -> list[dict[str, Any]]:
    judged = facts.filter((pl.col("role") == "test") & (pl.col("n_pair") > 0))
    columns = ("right", "log_prob", "causal", "faithful")
    judged = judged.with_columns(pl.col(one).cast(pl.Float64) for one in columns).with_columns(
        pl.col(one).mean().over("step", "relation").alias(f"mean_{one}") for one in columns
    )
    last = facts["step"].max()
    rows: list[dict[str, Any]] = []
    for steps in ("all", "last"):
        part = judged.filter((pl.col("step") == last) | (steps == "all"))
        if part["relation"].n_unique() < 3:
            continue
        groups = Groups(part["relation"].to_numpy(), draws=config.draws, seed=config.seed)
        y = part["log_pair"].to_numpy()
        sums: dict[str, Floats] = {}
        for name, features in _PREDICTORS.items():
            wide = part.select(features).to_numpy() if features else np.zeros((part.height, 0))
            off = np.abs(ridge_held_out(wide.astype(np.float64), y, groups) - y)
            columns = (np.ones_like(y), off <= 1, off <= np.log10(2), off)
            summed = groups.summed(np.column_stack(columns).astype(np.float64))
            sums[name] = summed[:, 1:] / summed[:, :1]
        for name, own in sums.items():
            share, more = estimate(own[:, 0]), estimate(sums["log_prob"][:, 2] - own[:, 2])
            rows.append({
                "predictor": name, "steps": steps, "within": share.value, "lo": share.lo, "hi": share.hi,
                "twice": float(own[0, 1]), "error": float(own[0, 2]), "more": more.value, "more_lo": more.lo,
                "more_hi": more.hi, "n": part.height,
            })  # fmt: skip
    return rows


def _fact_correlations(facts: pl.DataFrame, config: LinkConfig) -> list[dict[str, Any]]:
    last = facts["step"].max()
    rows: list[dict[str, Any]] = []
    for strength, steps in itertools.product(("right", "log_prob", "causal"), ("all", "last")):
        part = _aimed(facts) if strength == "causal" else facts
        part = part.filter((pl.col("step") == last) | (steps == "all"))
        groups = Groups(part["relation"].to_numpy(), draws=config.draws, seed=config.seed)
        y = part[strength].cast(pl.Float64).to_numpy()
        for one in COUNTS:
            r = estimate(correlations(part[f"log_{one}"].to_numpy(), y, groups))
            rows.append({
                "strength": strength, "counts": one, "steps": steps, "r": r.value, "lo": r.lo, "hi": r.hi,
                "n": part.height,
            })  # fmt: skip
    return rows


def _overlaps(facts: pl.DataFrame, config: LinkConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(the table `overlaps`; relation, subject, object of the facts that a flagged relation shares)."""
    last = facts.filter(pl.col("step") == pl.lit(facts["step"].max()))
    partners: dict[str, dict[str, set[str]]] = {}
    for relation, subject, thing in last.select("relation", "subject", "object").iter_rows():
        own = partners.setdefault(relation, {})
        own.setdefault(subject, set()).add(thing)
        own.setdefault(thing, set()).add(subject)
    rows: list[dict[str, Any]] = []
    taken: list[pl.DataFrame] = []
    for (name,), part in last.group_by(["relation"], maintain_order=True):
        pairs = part.select("subject", "object").rows()
        for other, of in partners.items():
            if other == name:
                continue
            hit = np.array([any(_holds(one, o) for one in of.get(s, ())) for s, o in pairs], dtype=bool)
            if not hit.any():
                continue
            share = float(hit.mean())
            n = part["n_pair"].to_numpy()
            both = [float(np.median(n[mask])) if mask.any() else None for mask in (hit, ~hit)]
            flagged = share >= config.overlap
            if flagged:
                taken.append(part.filter(pl.Series(hit)).select("relation", "subject", "object"))
            rows.append({
                "relation": name, "other": other, "shared": int(hit.sum()), "share": share, "flagged": flagged,
                "n_shared": both[0], "n_own": both[1],
            })  # fmt: skip
    none = last.head(0).select("relation", "subject", "object")
    table = pl.DataFrame(rows, schema=_OVERLAPS).sort("share", descending=True)
    return table, pl.concat([none, *taken]).unique()


def _holds(whole: str, part: str) -> bool:
    """Whether a line with the term `whole` mentions `part`: the same words, or some of them."""
    return whole == part or re.search(rf"(?<!\w){re.escape(part)}(?!\w)", whole) is not None
