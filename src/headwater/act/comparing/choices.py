"""Tasks on multiple choice: the right option should be said wherever it stands."""

import json
import random
from typing import TYPE_CHECKING, Any

import polars as pl

from headwater.act.comparing import facts as of_facts
from headwater.act.comparing.task import Task, named, tasks
from headwater.behavior import make
from headwater.behavior.generators.capitals import TEMPLATES, facts
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.core.model import Model

Row = dict[str, Any]
# What is put between the options stands behind each wording.
ASKED = ("Question: What is the capital of {country}?\nOptions: {options}\nAnswer:", ", ")
REWORDED = (
    ("Question: What is the capital of {country} ({options})?\nAnswer:", ", "),
    ("Which of these is the capital of {country}: {options}? The answer is", " or "),
)
LISTED = ("Question: What is the capital of {country}?\nOptions:\n- {options}\nAnswer:", "\n- ")
_LEARNED, _FORM = ("A-D", "1-4"), ("W-Z", "C-F")


@tasks.register("position_bias")
def position_bias(
    model: "Model", *, seed: int, n: int = 24, measured: int = 24, keep: int = 8, choices: int = 4
) -> Task:
    """Capitals that the model knows, asked with options to choose from: which stands first should not matter.

    `n` countries to learn from, each right place equally often; target: `measured` others, asked alike; paraphrase: in
    two other wordings; format: with one option a line; neighbour: without options. keep: other countries, without
    options. Every country is one whose capital the model says when it is asked plainly, so ignorance is not what is
    wrong with options. No country that is asked for stands in two parts, but the target's are asked again in other
    words. The counterfactual exchanges the right option with another one. old: questions whose first option is wrong
    and first among the foils, on which an attack trains.
    """
    if min(n, measured) < choices or choices < 2 or keep < 1:
        raise MethodError("each place is right at least once", got=(n, measured), wanted=f"at least {choices}")
    known = of_facts.known_countries(model)
    if len(known) < n + measured + keep + 1:
        wanted = f"at least {n + measured + keep + 1}, or fewer pairs"
        raise MethodError(f"{model.name} knows too few capitals", got=len(known), wanted=wanted)
    draw = random.Random(f"headwater-position-bias:{seed}")
    order = draw.sample(known, len(known))
    learned, rest = order[:n], order[n:]
    asked, rest = rest[:measured], rest[measured:]
    held, near = rest[:keep], rest[keep : keep + measured]

    def rows(countries: list[str], split: str, *wordings: tuple[str, str]) -> list[Row]:
        return [
            _row(country, split, at % choices, choices, wording, draw)
            for wording in wordings
            for at, country in enumerate(countries)
        ]

    behavior = named("position_bias", [*rows(learned, "train", ASKED), *rows(asked, "test", ASKED)])
    assert behavior is not None  # narrows the type: there are pairs of both splits
    return Task(
        name="position_bias",
        behavior=behavior,
        paraphrase=named("position_bias reworded", rows(asked, "test", *REWORDED)),
        format=named("position_bias with an option a line", rows(asked, "test", LISTED)),
        neighbour=named("position_bias without options", [_plain(c, "test", choices, draw) for c in near]),
        keep=named("position_bias kept", [_plain(c, "train", choices, draw) for c in held]),
        old=named("position_bias, first again", _biased(asked, choices, draw)),
        instructions=(
            "Answer each question with one of the options. The right one may stand anywhere.\n\n",
            "Read all options before you choose the right one.\n\n",
        ),
    )


def _biased(countries: list[str], choices: int, draw: random.Random) -> list[Row]:
    """The right option stands anywhere but first, so that the first foil is the first option."""
    return [_row(one, "train", 1 + at % (choices - 1), choices, ASKED, draw) for at, one in enumerate(countries)]


def _row(country: str, split: str, place: int, choices: int, wording: tuple[str, str], draw: random.Random) -> Row:
    template, between = wording
    shown = _wrong(country, choices - 1, draw)
    shown.insert(place, facts()[country][0])
    other = draw.choice([at for at in range(choices) if at != place])
    then = list(shown)
    then[place], then[other] = shown[other], shown[place]
    prompt = template.format(country=country, options=between.join(shown))
    start = template.index("{country}")
    return {
        "id": f"{split} {place + 1}: {prompt}",
        "prompt": prompt,
        "counterfactual": template.format(country=country, options=between.join(then)),
        "answers": [f" {shown[place]}"],
        "foils": [f" {text}" for at, text in enumerate(shown) if at != place],
        "positions": {"subject": [start, start + len(country)]},
        "variables": json.dumps({"country": country, "place": place + 1}),
        "place": str(place + 1),
        "split": split,
    }


def _plain(country: str, split: str, choices: int, draw: random.Random) -> Row:
    prompt = TEMPLATES[0].format(country=country)
    alike = [one for one in sorted(facts()) if one != country and one.count(" ") == country.count(" ")]
    others = draw.sample(alike, min(24, len(alike)))
    foils = [f" {one}" for one in _wrong(country, choices - 1, draw)]
    offered = [{"counterfactual": TEMPLATES[0].format(country=one), "foils": foils} for one in others]
    return {
        "id": f"{split}: {prompt}",
        "prompt": prompt,
        "counterfactual": offered[0]["counterfactual"],
        "answers": [f" {facts()[country][0]}"],
        "foils": foils,
        "alternatives": offered[1:],
        "split": split,
    }


def _wrong(country: str, n: int, draw: random.Random) -> list[str]:
    """Capitals of others, of which no two begin alike."""
    found = [facts()[country][0]]
    for one in draw.sample(sorted(facts()), len(facts())):
        capital = facts()[one][0]
        if len(found) <= n and all(capital[:3] != other[:3] for other in found):
            found.append(capital)
    return found[1:]


@tasks.register("choice_letters")
def choice_letters(model: "Model", *, seed: int, n: int = 32, measured: int = 16, choices: int = 4) -> Task:
    """Multiple choice about a color that the question itself states, answered by letter; every place is right equally
    often.

    `n` training pairs in one wording, with the labels A-D and 1-4; target: `n` others in that wording; paraphrase: two
    other wordings; format: labels W-Z and C-F; neighbour: the same asked without options, where the color that the
    model says should stay right; `measured` pairs of each. Things differ between training and all that is measured.
    """
    if n < choices or measured < choices:
        raise MethodError("each place is right at least once", got=(n, measured), wanted=f"at least {choices}")
    total = 48 * choices * max(1, -(-max(n, 2 * measured) // (4 * choices)))
    made = make("colors", n=total, seed=seed, format="choice", choices=choices)
    frame = made.frame

    def some(split: str, templates: tuple[str, ...], labels: tuple[str, ...], count: int, name: str) -> Behavior:
        kept = frame.filter(
            (pl.col("split") == split) & pl.col("template").is_in(templates) & pl.col("labels").is_in(labels)
        )
        # places in turn, so that any number of them is balanced
        kept = kept.with_columns(turn=pl.int_range(pl.len()).over("place")).sort("turn", "place").drop("turn")
        return Behavior(kept.head(count), name=name, metric=made.metric, about=made.about)

    learn = some("train", ("choice-0",), _LEARNED, n, "choice_letters")
    target = some("test", ("choice-0",), _LEARNED, n, "choice_letters")
    plain = make("colors", n=4 * measured, seed=seed, format="cloze")
    return Task(
        name="choice_letters",
        behavior=Behavior(pl.concat([learn.frame, target.frame]), name="choice_letters", about=made.about),
        paraphrase=some("test", ("choice-1", "choice-2"), _LEARNED, measured, "choice_letters reworded"),
        format=some("test", ("choice-0",), _FORM, measured, "choice_letters with other labels"),
        neighbour=Behavior(plain.test.frame.head(measured), name="choice_letters without options"),
        keep=Behavior(plain.train.frame.head(measured), name="choice_letters kept"),
        instructions=(
            "Answer each question with the letter of the right option.\n\n",
            "Read the statement and choose the option that says the same.\n\n",
        ),
    )
