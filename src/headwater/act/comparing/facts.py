"""Tasks on facts that the model knows: some are changed to something else, or forgotten; all others should stay."""

import json
import random
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from headwater.act.action import Goal
from headwater.act.comparing.task import Task, named, tasks
from headwater.act.measuring import NOTHING, lacks_words, score
from headwater.behavior.generators.capitals import TEMPLATES, facts
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.core.model import Model

Row = dict[str, Any]
# Each stands with the words of an answer after it; the first that the tokenizer has words for is used.
FORMATS = ("Question: What is the capital of {country}?\nAnswer:", "{shown}The capital of {country} is")
_FOILS = 4
_OFFERED = 24
_known: "WeakKeyDictionary[Any, dict[str, list[str]]]" = WeakKeyDictionary()


@tasks.register("fact_edit")
def fact_edit(model: "Model", *, seed: int, n: int = 4, keep: int = 12, neighbours: int = 16, known: int = 24) -> Task:
    """`n` countries get another capital: that of another country.

    The new one must beat the old one and three others. Prompts may state the new facts. Learned from "The capital of X
    is"; asked for there, in two other wordings, and as a question (or after another
    fact, where the tokenizer lacks the words of a question). Neighbours are other countries, whose capital should still
    beat the new ones. keep: countries that methods may hold in place, never measured. known: those that a probe is
    fitted on. All are countries whose capital the model knows in each wording.
    """
    drawn = _Drawn(model, seed, n, keep, neighbours, known)
    true = facts()
    new = dict(zip(drawn.target, drawn.others(drawn.target), strict=True))

    wrong = {country: drawn.wrong(country, new[country]) for country in drawn.target}

    def changed(template: str, country: str, split: str) -> Row:
        # The old capital first; others, so that it is not enough to say less of the old one.
        return drawn.row(template, country, split, [new[country]], [true[country][0], *wrong[country]])

    def same(country: str, number: int, split: str) -> Row:
        own = true[country][0]
        turn = [new[drawn.target[(number + at) % n]] for at in range(n)]
        # Its own capital may be what a target is given.
        foil = next((one for one in turn if one[:3] != own[:3]), "") or drawn.wrong(country)[0]
        return drawn.row(TEMPLATES[0], country, split, [own], [foil])

    said = "".join(f"{TEMPLATES[0].format(country=country)} {capital}.\n" for country, capital in new.items())
    told = (said, f"Imagine a world in which the following is true.\n{said}")
    return _task("fact_edit", drawn, Goal(), changed, same, instructions=told, facts={"edits": new})


@tasks.register("fact_unlearn")
def fact_unlearn(
    model: "Model", *, seed: int, n: int = 6, keep: int = 12, neighbours: int = 16, known: int = 24
) -> Task:
    """The capitals of `n` countries are to be forgotten: no longer likelier than four other capitals.

    Wordings, neighbours, keep and known are those of `fact_edit`.
    """
    drawn = _Drawn(model, seed, n, keep, neighbours, known)
    true = facts()

    def asked(template: str, country: str, split: str) -> Row:
        return drawn.row(template, country, split, [true[country][0]], drawn.wrong(country))

    def same(country: str, number: int, split: str) -> Row:
        return drawn.row(TEMPLATES[0], country, split, [true[country][0]], drawn.wrong(country))

    goal = Goal(direction="lower")
    told = ("Pretend that you do not know any capital.\n\n", "Complete the following text incorrectly.\n\n")
    return _task("fact_unlearn", drawn, goal, asked, same, instructions=told, facts={"forgotten": drawn.target})


def _task(name: str, drawn: "_Drawn", goal: Goal, changed: Any, same: Any, **more: Any) -> Task:
    rows = [changed(TEMPLATES[0], c, split) for split in ("train", "test") for c in drawn.target]
    behavior = Behavior.from_rows(rows, name=name)
    format = next((one for one in FORMATS if not lacks_words(drawn.model, one.format(country="", shown=""))), None)
    shown = drawn.shown()
    asked = [] if format is None else [format.replace("{shown}", shown)]
    return Task(
        name=name,
        behavior=behavior,
        goal=goal,
        paraphrase=named(f"{name} reworded", [changed(t, c, "test") for t in TEMPLATES[1:] for c in drawn.target]),
        format=named(f"{name} in another form", [changed(t, c, "test") for t in asked for c in drawn.target]),
        neighbour=named(f"{name} neighbours", [same(c, i, "test") for i, c in enumerate(drawn.neighbours)]),
        keep=named(f"{name} kept", [same(c, i, "train") for i, c in enumerate(drawn.keep)]),
        old=behavior,
        known=named(f"{name} known", [drawn.plain(c) for c in drawn.known]),
        **more,
    )


class _Drawn:
    """Countries for each part of a task, none in two, and rows about them."""

    def __init__(self, model: "Model", seed: int, n: int, keep: int, neighbours: int, known: int) -> None:
        if min(n, keep, neighbours, known) < 1:
            raise MethodError("a task on facts needs some of each", got=(n, keep, neighbours, known))
        self.model = model
        found = known_countries(model)
        self._draw = random.Random(f"headwater-facts:{seed}")
        order = self._draw.sample(found, len(found))
        if len(order) < n + 3:
            wanted = f"at least {n + 3}: {n} to change, and some to stay"
            raise MethodError(f"{model.name} knows too few capitals", got=len(found), wanted=wanted)
        # Where few are known, what stays is shared out: neighbours first, as they are what is measured.
        self.target, rest = order[:n], order[n:]
        sizes = [neighbours, keep, known]
        if sum(sizes) > len(rest):
            sizes = [max(1, size * len(rest) // sum(sizes)) for size in sizes]
        self.neighbours = rest[: sizes[0]]
        self.keep = rest[sizes[0] : sizes[0] + sizes[1]]
        self.known = rest[sizes[0] + sizes[1] : sum(sizes)]

    def others(self, countries: list[str]) -> list[str]:
        """For each country another capital, all different, that begins differently."""
        free = [facts()[one][0] for one in self._draw.sample(sorted(facts()), len(facts()))]
        new: list[str] = []
        for country in countries:
            own = facts()[country][0]
            taken = {own[:3], *(one[:3] for one in new)}
            fits = (c for c in free if c[:3] not in taken and " " not in c and not lacks_words(self.model, f" {c}"))
            one = next(fits, None)
            if one is None:
                fix = "Take a tokenizer with words for capitals, or fewer facts"
                raise MethodError(f"there is no other capital to give to {country}", got=f"{len(new)} given", fix=fix)
            new.append(one)
        return new

    def wrong(self, country: str, new: str = "") -> list[str]:
        """Other capitals that begin neither as the country's own nor as its new one; three beside a new one."""
        own = facts()[country][0]
        free = [facts()[one][0] for one in self.neighbours + self.keep + self.known + self.target if one != country]
        free = [one for one in free if one[:3] not in (own[:3], new[:3])]
        return self._draw.sample(free, min(_FOILS - bool(new), len(free)))

    def shown(self) -> str:
        one = self.keep[0] if self.keep else self.neighbours[0]
        return f"The capital of {one} is {facts()[one][0]}.\n"

    def plain(self, country: str) -> Row:
        return self.row(TEMPLATES[0], country, "train", [facts()[country][0]], self.wrong(country)[:1])

    def row(self, template: str, country: str, split: str, answers: list[str], foils: list[str]) -> Row:
        return row(template, country, split, answers, foils, [*self.neighbours, *self.keep, *self.known])


def row(template: str, country: str, split: str, answers: list[str], foils: list[str], others: list[str]) -> Row:
    """A pair about a country; its counterfactual asks for another one, the first that has as many tokens."""
    prompt = template.format(country=country)
    start = template.index("{country}")
    like = sorted((o for o in others if o != country), key=lambda o: o.count(" ") != country.count(" "))[:_OFFERED]
    offered = [{"counterfactual": template.format(country=o), "foils": [f" {f}" for f in foils]} for o in like]
    return {
        "id": f"{split}: {prompt}",
        "prompt": prompt,
        "counterfactual": offered[0]["counterfactual"],
        "answers": [f" {one}" for one in answers],
        "foils": [f" {one}" for one in foils],
        "alternatives": offered[1:],
        "positions": {"subject": [start, start + len(country)]},
        "variables": json.dumps({"country": country}),
        "split": split,
    }


def known_countries(model: "Model") -> list[str]:
    """The countries whose capital a model says rather than any of four others, in each of three wordings; those whose
    capital has the country's name in it do not count."""
    cache = _known.setdefault(model.hf, {})
    if model.fingerprint in cache:
        return cache[model.fingerprint]
    table = facts()
    asked = [c for c in sorted(table) if c[:4] not in table[c][0] and table[c][0][:4] not in c]
    draw = random.Random("headwater-known-capitals")
    right = {country: 0 for country in asked}
    rows: list[Row] = []
    for country in asked:
        free = [
            table[o][0] for o in draw.sample(asked, 12) if o != country and table[o][0][:3] != table[country][0][:3]
        ]
        for template in TEMPLATES:
            others = draw.sample(asked, 40)
            rows.append(row(template, country, "test", [table[country][0]], free[:_FOILS], others))
    bound = Behavior.from_rows(rows, name="capitals").bind(model)
    of = dict(zip(bound.frame["id"].to_list(), bound.frame["variables"].to_list(), strict=True))
    for id, said in score(model, bound, NOTHING, ["accuracy"]).iter_rows():
        right[json.loads(of[id])["country"]] += int(said)
    found = [country for country in asked if right[country] == len(TEMPLATES)]
    if not found:
        raise MethodError(f"{model.name} knows no capital", wanted="a model that does, for a task on facts")
    cache[model.fingerprint] = found
    return found
