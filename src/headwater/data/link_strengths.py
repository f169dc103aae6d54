"""How strong the mechanism of each relation is at each checkpoint: what is held against counts.

For each relation the map of a linear relational embedding (Hernandez et al., 2024) is fitted at each checkpoint, and
judged on facts that it was not fitted on. Where in the model, and with which rank, is chosen once: at the last
checkpoint, on validation facts that are not judged.
"""

import hashlib
import importlib
import io
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch

from headwater.behavior import metrics
from headwater.core.errors import BehaviorError, MethodError, StoreError
from headwater.core.files import holds_something, read_json, to_json, write_whole
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.data import lre
from headwater.data.relations import Relation

if TYPE_CHECKING:
    from headwater.core.model import Model

SLICES = ("all", "single", "several")
"""Of subjects: all; those of one token (a leading "the" aside); those of several."""
_FORMAT = 1
_RELATIONS: dict[str, Any] = {
    "step": pl.Int64, "relation": pl.String, "subjects": pl.String, "n": pl.Int64, "causality": pl.Float64,
    "lo": pl.Float64, "hi": pl.Float64, "said_causality": pl.Float64, "faithfulness": pl.Float64,
    "accuracy": pl.Float64, "log_prob": pl.Float64,
}  # fmt: skip
_FACTS: dict[str, Any] = {
    "step": pl.Int64, "relation": pl.String, "subject": pl.String, "object": pl.String, "role": pl.String,
    "tokens": pl.Int64, "right": pl.Boolean, "log_prob": pl.Float64, "faithful": pl.Boolean, "target": pl.String,
    "causal": pl.Boolean, "said": pl.Boolean,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StrengthConfig:
    """How mechanisms are measured.

    examples: subjects whose Jacobians are averaged. validation: subjects at most on which layer and rank are chosen;
    n_test: those at most on which they are judged. layers: "embed" or block numbers (None: "embed" and all but the last
    block). ranks: of the pseudo-inverse. template: which prompt of a relation. shown: examples stand in the prompts.
    """

    examples: int = 10
    validation: int = 30
    n_test: int = 100
    layers: tuple[int | str, ...] | None = None
    ranks: tuple[int, ...] = (4, 8, 12, 16, 24, 32)
    beta: float = 1.0
    template: int = 0
    shown: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 2 or self.validation < 2 or self.n_test < 2:
            got = f"examples {self.examples}, validation {self.validation}, n_test {self.n_test}"
            raise MethodError("strengths need facts to fit on, choose on and judge on", got=got, wanted="2 or more")
        if not self.ranks or min(self.ranks) < 1:
            raise MethodError("the ranks do not fit", got=list(self.ranks), wanted="1 or more")


@register_result
class Strengths(Result):
    """Mechanisms by relation and checkpoint.

    `tables["relations"]`: step, relation, subjects ("all", "single" or "several" tokens), n (facts judged), causality
    (with its Wilson interval lo, hi), said_causality, faithfulness, accuracy, log_prob (nats, mean). Causality: the
    share of facts whose subject, edited towards another, makes the model say the *true* object of that other, which it
    did not say before. said_causality: makes it say what it says of that other, true or not, changed or not: an
    untrained model, that says one thing always, has much of it.

    `tables["facts"]`, all facts: step, relation, subject, object, role ("train", "validation", "test" or "rest"),
    tokens (of the subject), right (the object's first token is the likeliest), log_prob (of that token); of test facts
    faithful, target (whose object it was edited towards), causal, said (the two causalities). `tables["choice"]`:
    relation, subjects, layer (-1: the embedding), rank, causality (on validation). Facts: steps, relations.
    """

    kind: ClassVar[str] = "strengths"
    main: ClassVar[str | None] = "relations"

    @property
    def steps(self) -> list[int]:
        return list(self.facts["steps"])

    def judged(self) -> pl.DataFrame:
        """The test facts, at every step."""
        return self.tables["facts"].filter(pl.col("role") == "test")


@dataclass
class _Plan:
    """The facts of a relation, by what they serve for."""

    relation: Relation
    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]
    test: list[tuple[str, str]]


def relation_strengths(
    series: Any,
    relations: Iterable[Relation] | Mapping[str, Relation],
    *,
    out: str | Path | None = None,
    steps: Iterable[int] | None = None,
    config: StrengthConfig | None = None,
    **options: Any,
) -> Strengths:
    """The linear mechanism of each relation at each checkpoint. Options are those of `StrengthConfig`.

    series: a `CheckpointSeries`, what `CheckpointSeries.of` takes (a run's folder), or {step: model}. steps: only
    these. out: a folder; each checkpoint that was measured is kept there, and the same call goes on after `kill -9`.

    Raises BehaviorError for a relation that is too small, MethodError for options, StoreError for a folder of another
    measurement. Known failure: causality counts only what the model knows (an edit towards an object that it does not
    know cannot succeed), so it is bounded by accuracy; layer and rank are those of the last checkpoint, and a mechanism
    that lay elsewhere before is underrated there.
    """
    started = time.monotonic()
    config = configured(StrengthConfig, config, options)
    wanted = list(relations.values()) if isinstance(relations, Mapping) else list(relations)
    if not wanted or len({one.name for one in wanted}) < len(wanted):
        raise MethodError("strengths need relations, each once", got=[one.name for one in wanted])
    plans = [_plan(one, config) for one in wanted]
    models = _Models(series, steps)
    store = _Store(Path(out), wanted, config, models) if out is not None else None
    last = models.open(models.steps[-1])
    choice = store.choice() if store is not None else None
    if choice is None:
        choice = _choose(last, plans, config)
        if store is not None:
            store.save_choice(choice)
    settings = {
        (row["relation"], row["subjects"]): ("embed" if row["layer"] < 0 else row["layer"], row["rank"])
        for row in choice.to_dicts()
    }
    tables: list[pl.DataFrame] = []
    for step in track(models.steps, "measuring relations"):
        table = store.load(step) if store is not None else None
        if table is None:
            model = last if step == models.steps[-1] else models.open(step)
            rows = [row for plan in plans for row in _measure(model, plan, settings, config)]
            table = pl.DataFrame([{"step": step, **row} for row in rows], schema=_FACTS)
            if store is not None:
                store.save(step, table)
        tables.append(table)
    facts = pl.concat(tables)
    return Strengths(
        tables={"relations": summary(facts), "facts": facts, "choice": choice},
        facts={"steps": models.steps, "relations": [one.name for one in wanted]},
        config=asdict(config),
        provenance=Provenance.collect(last, seed=config.seed, seconds=time.monotonic() - started),
    )


def summary(facts: pl.DataFrame) -> pl.DataFrame:
    """The table `relations` of a table of facts: the means over the judged ones."""
    judged = facts.filter(pl.col("role") == "test")
    parts = {
        "all": judged,
        "single": judged.filter(pl.col("tokens") == 1),
        "several": judged.filter(pl.col("tokens") > 1),
    }
    rows: list[dict[str, Any]] = []
    for subjects, part in parts.items():
        for (step, relation), group in part.group_by(["step", "relation"], maintain_order=True):
            value, lo, hi = metrics.interval(group["causal"].cast(pl.Float64).to_list(), share=True)
            means = {name: group[column].cast(pl.Float64).mean() for name, column in _MEANS.items()}
            own = {"step": step, "relation": relation, "subjects": subjects, "n": group.height}
            rows.append({**own, "causality": value, "lo": lo, "hi": hi, **means})
    return pl.DataFrame(rows, schema=_RELATIONS)


_MEANS = {"said_causality": "said", "faithfulness": "faithful", "accuracy": "right", "log_prob": "log_prob"}


def _plan(relation: Relation, config: StrengthConfig) -> _Plan:
    samples = lre.shuffled(relation.samples, config.seed)
    rest = samples[config.examples :]
    if len(rest) < 6 or len({answer for _, answer in rest}) < 2:
        raise BehaviorError(
            f"{relation.name!r} is too small", got=f"{len(samples)} subjects", wanted=f"{config.examples + 6} or more"
        )
    if not 0 <= config.template < len(relation.templates):
        raise MethodError(f"{relation.name!r} has no such template", got=config.template)
    n = min(config.validation, len(rest) // 3)
    return _Plan(relation, samples[: config.examples], rest[:n], rest[n : n + config.n_test])


def _choose(model: "Model", plans: list[_Plan], config: StrengthConfig) -> pl.DataFrame:
    """Layer and rank of each relation by its causality on validation facts. For subjects of several tokens, of which a
    relation has few, one layer and rank serve all relations: the best over all of them."""
    layers = config.layers if config.layers is not None else ("embed", *range(model.n_layers - 1))
    rows: list[dict[str, Any]] = []
    pooled: dict[tuple[int | str, int], list[bool]] = {}
    for plan in track(plans, "choosing layers and ranks"):
        scores: dict[tuple[int | str, int], float] = {}
        facts = _Facts(model, plan, plan.validation, layers, config)
        for layer in layers:
            fitted = facts.fit(layer)
            for rank in config.ranks:
                hits = facts.edited(fitted, rank)[0]
                scores[layer, rank] = sum(hits) / len(hits)
                several = [hit for hit, size in zip(hits, facts.sizes, strict=True) if size > 1]
                pooled.setdefault((layer, rank), []).extend(several)
        best = max(scores, key=lambda one: scores[one])  # of equals the first: the lowest layer and rank
        rows.append({"relation": plan.relation.name, "subjects": "single", **_chosen(best, scores[best])})
    means = {one: sum(hits) / len(hits) if hits else 0.0 for one, hits in pooled.items()}
    best = max(means, key=lambda one: means[one])
    rows += [{"relation": one.relation.name, "subjects": "several", **_chosen(best, means[best])} for one in plans]
    return pl.DataFrame(rows)


def _chosen(where: tuple[int | str, int], value: float) -> dict[str, Any]:
    return {"layer": -1 if where[0] == "embed" else where[0], "rank": where[1], "causality": float(value)}


class _Facts:
    """Some facts of a relation, asked of a model: prompts, streams, and what the model says."""

    def __init__(
        self,
        model: "Model",
        plan: _Plan,
        about: list[tuple[str, str]],
        layers: Iterable[int | str],
        config: StrengthConfig,
    ) -> None:
        self.model, self.plan, self.config = model, plan, config
        self.template = plan.relation.templates[config.template]
        self.asked = lre.ask(model, plan.relation, about, plan.train if config.shown else (), self.template)
        self.z, self.said, self.streams = lre.measure(model, self.asked, list(layers))
        self.first = torch.tensor([lre.first_token(model, answer) for _, answer in about])
        if len(set(self.first.tolist())) < 2:
            raise BehaviorError(f"the objects of {plan.relation.name!r} begin all alike", got=about[0][1])
        self.sizes = [_size(model, subject) for subject, _ in about]
        self.targets = _targets(self.first.tolist(), self.sizes, config.seed)

    def fit(self, layer: int | str) -> lre.Lre:
        shown = self.config.shown
        return lre.fit(self.model, self.plan.relation, self.plan.train, self.template, layer, shown=shown)

    def faithful(self, fitted: lre.Lre) -> list[bool]:
        """Whether the map says what the model says, fact by fact."""
        guess = fitted(self.streams[fitted.layer], beta=self.config.beta)
        return (lre.decode(self.model, self.asked, guess) == self.said).tolist()

    def edited(self, fitted: lre.Lre, rank: int) -> tuple[list[bool], list[bool]]:
        """Whether each edit towards its target makes the model say the target's object, where it did not before; and
        whether it makes it say what it says of the target."""
        goal = torch.tensor(self.targets)
        change = fitted.edit(self.z[goal] - self.z, rank)
        got = lre.edited_says(self.model, self.asked, list(range(len(goal))), fitted.layer, change)
        # a model that says it of all subjects was not moved by the edit
        moved = (got == self.first[goal]) & (self.said != self.first[goal])
        return moved.tolist(), (got == self.said[goal]).tolist()


def _measure(
    model: "Model", plan: _Plan, settings: dict[tuple[str, str], tuple[int | str, int]], config: StrengthConfig
) -> Iterator[dict[str, Any]]:
    """A row a fact of the relation."""
    name = plan.relation.name
    used = {subjects: settings[name, subjects] for subjects in ("single", "several")}
    facts = _Facts(model, plan, plan.test, dict.fromkeys(layer for layer, _ in used.values()), config)
    found: dict[str, tuple[list[bool], list[bool], list[bool]]] = {}
    fitted = {layer: facts.fit(layer) for layer in dict.fromkeys(layer for layer, _ in used.values())}
    for subjects, (layer, rank) in used.items():
        found[subjects] = (facts.faithful(fitted[layer]), *facts.edited(fitted[layer], rank))
    judged: dict[tuple[str, str], dict[str, Any]] = {}
    for i, fact in enumerate(plan.test):
        faithful, causal, said = (values[i] for values in found["single" if facts.sizes[i] == 1 else "several"])
        target = plan.test[facts.targets[i]][0]
        judged[fact] = {"role": "test", "faithful": faithful, "target": target, "causal": causal, "said": said}
    others = dict.fromkeys(plan.train, "train") | dict.fromkeys(plan.validation, "validation")
    everything = list(dict.fromkeys(lre.shuffled(plan.relation.samples, config.seed)))
    right, log_probs = _known(model, plan, everything, facts.template, config)
    for fact, hit, value in zip(everything, right, log_probs, strict=True):
        own = {"relation": name, "subject": fact[0], "object": fact[1], "tokens": _size(model, fact[0])}
        rest = judged.get(fact, {"role": others.get(fact, "rest")})
        yield {**own, "right": hit, "log_prob": value, **rest}


def _known(
    model: "Model", plan: _Plan, facts: list[tuple[str, str]], template: str, config: StrengthConfig
) -> tuple[list[bool], list[float]]:
    """Of each fact whether its object's first token is the likeliest, and that token's log-probability."""
    asked = lre.ask(model, plan.relation, facts, plan.train if config.shown else (), template)
    first = torch.tensor([lre.first_token(model, answer) for _, answer in facts])
    right, log_probs = [False] * len(facts), [0.0] * len(facts)
    for rows in lre.groups(asked):
        logits = model.run(torch.stack([asked.tokens[i] for i in rows]), logits="last").logits.double().cpu()
        mine = first[rows]
        values = logits.log_softmax(-1)[torch.arange(len(rows)), mine].tolist()
        for i, hit, value in zip(rows, (logits.argmax(-1) == mine).tolist(), values, strict=True):
            right[i], log_probs[i] = hit, value
    return right, log_probs


def _targets(first: list[int], sizes: list[int], seed: int) -> list[int]:
    """For each fact another of another object, by chance; if there is one, of a subject with one or several tokens, as
    its own has."""
    chance, found = random.Random(seed), list[int]()
    for i, answer in enumerate(first):
        others = [j for j, other in enumerate(first) if other != answer]
        alike = [j for j in others if (sizes[j] > 1) == (sizes[i] > 1)]
        found.append(chance.choice(alike or others))
    return found


def _size(model: "Model", subject: str) -> int:
    """Tokens of a subject after a space, without an article."""
    ids: Any = model.tokenizer(f" {subject.removeprefix('the ')}", add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    return len(ids)


class _Models:
    """The models of a series, by step."""

    def __init__(self, series: Any, steps: Iterable[int] | None) -> None:
        if isinstance(series, Mapping) and not all(isinstance(one, str | Path) for one in series.values()):
            self._given: Any = dict(sorted(series.items()))
            self.steps: list[int] = list(self._given)
        else:
            # By name: rooms of stages do not import each other, and checkpoints are those of dynamics.
            of = importlib.import_module("headwater.dynamics.series").CheckpointSeries.of
            self._given = of(series)
            self.steps = list(self._given.steps)
        if steps is not None:
            asked = sorted(set(steps))
            if missing := sorted(set(asked) - set(self.steps)):
                raise StoreError("no such checkpoints", got=missing, wanted=f"of {self.steps}")
            self.steps = asked
        if not self.steps:
            raise MethodError("strengths need checkpoints")

    def open(self, step: int) -> "Model":
        return self._given[step] if isinstance(self._given, dict) else self._given.open(step)

    def identity(self) -> Any:
        """What tells the last checkpoint from another."""
        return self.open(self.steps[-1]).fingerprint


class _Store:
    """The folder: strengths.json (what is measured), choice.parquet, step-N.parquet; each file whole or not there."""

    def __init__(self, folder: Path, relations: list[Relation], config: StrengthConfig, models: _Models) -> None:
        self.folder = folder
        about = [_FORMAT, [[one.name, one.templates, one.samples] for one in relations], asdict(config)]
        about.append(models.identity())
        key = hashlib.sha256(to_json(about, indent=None).encode()).hexdigest()
        head = folder / "strengths.json"
        if head.exists():
            if read_json(head, what="what strengths were measured").get("key") != key:
                raise StoreError(
                    f"{folder} holds strengths of another model, other relations or other settings",
                    fix="Choose another folder, or remove this one",
                )
        elif holds_something(folder):
            raise StoreError("will not measure into a folder that holds something else", got=folder)
        else:
            write_whole(head, to_json({"key": key}).encode())

    def choice(self) -> pl.DataFrame | None:
        return self._read("choice")

    def save_choice(self, table: pl.DataFrame) -> None:
        self._write("choice", table)

    def load(self, step: int) -> pl.DataFrame | None:
        return self._read(f"step-{step}")

    def save(self, step: int, table: pl.DataFrame) -> None:
        self._write(f"step-{step}", table)

    def _read(self, name: str) -> pl.DataFrame | None:
        file = self.folder / f"{name}.parquet"
        if not file.exists():
            return None
        try:
            return pl.read_parquet(file)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise StoreError(f"{file} is damaged", got=str(error).splitlines()[0], fix="Remove it") from None

    def _write(self, name: str, table: pl.DataFrame) -> None:
        data = io.BytesIO()
        table.write_parquet(data)
        write_whole(self.folder / f"{name}.parquet", data.getvalue())
