"""Colors: the answer stands in the prompt and has only to be copied, as cloze and as multiple choice.

A model that fails here in one format does not lack the answer, it lacks the format (the copying-colors control of
Wiegreffe et al. 2024).
"""

import random

from headwater.behavior.generators import (
    Made,
    Pair,
    Spans,
    draw,
    fill,
    generator,
    halves,
    last_word,
    one_of,
    whole,
    words,
)

COLORS = words("red blue green yellow white black brown orange purple pink gray silver")
# Things of any color, so that knowing the world does not help.
THINGS = words("""
    box book car chair cup door house table shirt coat hat bag ball truck bike bird cat dog flower letter card phone
    plate bowl bottle coin ring boat train horse
""")
# How many things there are -> templates. With one the color has only to be copied; with two it must also be found.
CLOZE = {
    1: (
        "The {first} is {one}. The color of the {asked} is",
        "This {first} is {one}. What color is the {asked}? The {asked} is",
        "My {first} is {one}. If you ask for the color of my {asked}, it is",
    ),
    2: (
        "The {first} is {one} and the {second} is {two}. The color of the {asked} is",
        "There is a {first} and a {second}. The {first} is {one}, the {second} is {two}. The {asked} is",
        "A {first} that is {one} lies beside a {second} that is {two}. The color of the {asked} is",
    ),
}
CHOICE = (
    "The {asked} is {stated}. What color is the {asked}?\n{options}\nAnswer: (",
    "Question: A {asked} is {stated}. Which color is the {asked}?\n{options}\nAnswer: (",
    "My {asked} is {stated}. The color of my {asked} is which of these?\n{options}\nThe answer is (",
)
# An opening bracket stands before a label: after it letters and digits are tokens of their own in every tokenizer.
LABELS = {"A-D": "ABCD", "C-F": "CDEF", "W-Z": "WXYZ", "1-4": "1234"}


@generator("colors")
def colors(
    n: int | None, rng: random.Random, *, format: str = "both", choices: int = 4, things: int = 1, shots: int = 0
) -> Made:
    """Copying colors: the color is said in the prompt; asked as cloze and as multiple choice.

    In cloze form the counterfactual says another color (with two things, it exchanges theirs), which is the foil. In
    multiple choice the right option and another one change places. Every template, label set and answer position is
    met equally often. Positions stated, asked and END; slices by format, template, label set, and place: which option
    (or which of the two things) is right. Train and test share no thing.

    Options
    -------
    format: "cloze", "choice" or "both" in turn.
    choices: how many options a multiple choice has (2 to 4).
    things: how many things the cloze form speaks of, 1 or 2; with two the model must also find the right one.
    shots: how many solved examples of the same format stand before the question (0 to 5).
    """
    one_of("format", format, ("cloze", "choice", "both"))
    whole("choices", choices, 2, 4)
    whole("shots", shots, 0, 5)
    whole("things", things, 1, 2)
    known = halves(THINGS, rng)

    def make(index: int, split: str, rng: random.Random) -> Pair:
        # Cells (template, labels, place) are met in turn, the split fastest: pairs 2i and 2i + 1 are of the same cell.
        kind = format if format != "both" else ("cloze", "choice")[index // 2 % 2]
        cell = index // 2 if format != "both" else index // 4
        if kind == "cloze":
            return _cloze(cell, split, known[split], rng, things, shots)
        return _choice(cell, split, known[split], rng, choices, shots)

    return Made(pairs=draw(192 if n is None else n, rng, make, name="colors"))


def _cloze(cell: int, split: str, known: list[str], rng: random.Random, things: int, shots: int) -> Pair:
    index = cell % len(CLOZE[things])
    place = cell // len(CLOZE[things]) % things
    shown = ""
    for shot in range(shots):
        solved, _then, answer, *_rest = _ask_cloze(index, shot % things, known, rng, things)
        shown += f"{solved} {answer}.\n"
    prompt, counterfactual, answer, foil, spans = _ask_cloze(index, place, known, rng, things)
    stated = spans[("one", "two")[place]]
    return Pair(
        prompt=shown + prompt,
        counterfactual=shown + counterfactual,
        answers=[f" {answer}"],
        foils=[f" {foil}"],
        positions=_moved({"stated": stated, "asked": spans["asked"], "END": last_word(prompt)}, len(shown)),
        variables={"color": answer, "place": place + 1},
        template=f"cloze-{index}",
        split=split,
        slices={"format": "cloze", "labels": "none", "place": str(place + 1)},
    )


def _ask_cloze(
    index: int, place: int, known: list[str], rng: random.Random, things: int
) -> tuple[str, str, str, str, Spans]:
    """Prompt, counterfactual, answer, foil, spans. With two things their colors are exchanged, with one it has
    another."""
    named = rng.sample(known, 2)
    said = rng.sample(COLORS, 2)
    values = {"first": named[0], "second": named[1], "asked": named[place]}
    prompt, spans = fill(CLOZE[things][index], {**values, "one": said[0], "two": said[1]})
    counterfactual, _spans = fill(CLOZE[things][index], {**values, "one": said[1], "two": said[0]})
    return prompt, counterfactual, said[place], said[1 - place], spans


def _choice(cell: int, split: str, known: list[str], rng: random.Random, choices: int, shots: int) -> Pair:
    names = list(LABELS)
    place, labels = cell % choices, names[cell // choices % len(names)]
    index = cell // (choices * len(names)) % len(CHOICE)
    shown = "".join(
        prompt + answers[0] + ")\n\n"
        for prompt, _cf, answers, *_rest in (
            _ask_choice(index, rng.randrange(choices), labels, choices, known, rng) for _ in range(shots)
        )
    )
    prompt, counterfactual, answers, foils, spans = _ask_choice(index, place, labels, choices, known, rng)
    return Pair(
        prompt=shown + prompt,
        counterfactual=shown + counterfactual,
        answers=answers,
        foils=foils,
        positions=_moved({**spans, "END": (len(prompt) - 1, len(prompt))}, len(shown)),
        variables={"label": answers[0], "place": place + 1},
        template=f"choice-{index}",
        split=split,
        slices={"format": "choice", "labels": labels, "place": str(place + 1)},
    )


def _ask_choice(
    index: int, place: int, labels: str, choices: int, known: list[str], rng: random.Random
) -> tuple[str, str, list[str], list[str], Spans]:
    letters = LABELS[labels][:choices]
    thing, shown = rng.choice(known), rng.sample(COLORS, choices)
    other = rng.choice([at for at in range(choices) if at != place])
    then = list(shown)
    then[place], then[other] = shown[other], shown[place]
    values = {"asked": thing, "stated": shown[place]}
    prompt, spans = fill(CHOICE[index], {**values, "options": _options(letters, shown)})
    counterfactual, _spans = fill(CHOICE[index], {**values, "options": _options(letters, then)})
    foils = [letter for at, letter in enumerate(letters) if at != place]
    # where the right option's text stands
    before = _options(letters[: place + 1], shown[: place + 1])
    start = spans["options"][0] + len(before) - len(shown[place])
    positions = {"stated": spans["stated"], "asked": spans["asked"], "option": (start, start + len(shown[place]))}
    return prompt, counterfactual, [letters[place]], foils, positions


def _options(letters: str, texts: list[str]) -> str:
    return "\n".join(f"({letter}) {text}" for letter, text in zip(letters, texts, strict=True))


def _moved(spans: Spans, by: int) -> Spans:
    return {name: (start + by, end + by) for name, (start, end) in spans.items()}
