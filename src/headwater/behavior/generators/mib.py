"""Tasks in MIB's format, made from its lists of templates, names and things (Mueller et al., 2025; Apache-2.0).

The lists are read from a folder that the user gives (`ioi_templates.json`, `ioi_names.json`, ...): nothing of them is
kept here. Whoever has the benchmark's own rows reads those with `headwater.behavior.mib.read_mib`.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

from headwater.behavior.generators import Made, Pair, Spans, draw, fill, generator, halves, last_word, one_of, whole
from headwater.core.errors import BehaviorError

SOURCE, LICENCE = "lists of the MIB benchmark", "Apache-2.0"
IOI = (
    "s2_io_flip", "s1_io_flip", "s1_ioi_flip_s2_ioi_flip", "abc", "random_names", "random_names_s1_ioi_flip",
    "random_names_s2_ioi_flip", "random_names_s1_ioi_flip_s2_ioi_flip",
)  # fmt: skip
MCQA = ("symbol", "answerPosition", "randomLetter", "answerPosition_randomLetter")
ARITHMETIC = ("random", "ones_op1", "ones_op2", "tens_op1", "tens_op2", "ones_carry", "tens_carry")
# the six forms of Stolfo et al. (2023), from which MIB takes its questions
SUMS = (
    "Q: How much is {x} plus {y}? A:", "Q: What is {x} plus {y}? A:", "Q: What is the result of {x} plus {y}? A:",
    "Q: What is the sum of {x} and {y}? A:", "The sum of {x} and {y} is", "{x} + {y} =",
)  # fmt: skip
DIFFERENCES = (
    "Q: How much is {x} minus {y}? A:", "Q: What is {x} minus {y}? A:", "Q: What is the result of {x} minus {y}? A:",
    "Q: What is the difference between {x} and {y}? A:", "The difference between {x} and {y} is", "{x} - {y} =",
)  # fmt: skip


def _list(data: str, name: str) -> list[Any]:
    if not data:
        raise BehaviorError(
            "MIB's lists are not part of this package", wanted="data=FOLDER with its ioi_*.json and mcqa_*.json files",
            fix="Point data at a copy of the benchmark's lists",
        )  # fmt: skip
    path = Path(os.path.expanduser(data)) / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BehaviorError(f"cannot read MIB's list {name}", got=str(error), wanted=f"{name} in data={data}") from None
    if not isinstance(found, list) or len(found) < 2:
        raise BehaviorError(f"MIB's list {name} holds no list", got=type(found).__name__)
    return found


@generator("mib_ioi")
def mib_ioi(n: int | None, rng: random.Random, *, data: str = "", counterfactual: str = "s2_io_flip") -> Made:
    """Indirect objects in MIB's form: its templates, names, places and objects, its eight counterfactuals.

    The answer is the name said once (IO), the foil the name said twice (S), whatever the counterfactual. The track's
    own counterfactual, s2_io_flip, has the other person act. Positions IO, S1, S2, END; slices by template and order.
    Train and test share no name.

    Options
    -------
    data: the folder with MIB's ioi_templates.json, ioi_names.json, ioi_places.json and ioi_objects.json.
    counterfactual: one of MIB's eight, without `_counterfactual`.
    """
    one_of("counterfactual", counterfactual, IOI)
    # "an {object}" only fits objects that begin with a vowel
    objects = [str(text) for text in _list(data, "ioi_objects.json")]
    templates = [str(text) for text in _list(data, "ioi_templates.json")]
    names = halves([str(text) for text in _list(data, "ioi_names.json")], rng)
    places = [str(text) for text in _list(data, "ioi_places.json")]

    def make(index: int, split: str, rng: random.Random) -> Pair | None:
        template, thing = rng.choice(templates), rng.choice(objects)
        vowel = thing[0] in "aeiou"
        if ("an {object}" in template and not vowel) or (" a {object}" in template and vowel):
            return None
        io, subject, *others = rng.sample(names[split], 5)
        first = rng.random() < 0.5  # IO is said first (ABBA)
        values = {"place": rng.choice(places), "object": thing}

        def said(one: str, two: str, flip1: bool, flip2: bool, third: str | None = None) -> dict[str, str]:
            """one: who is given the thing. flip1: the two change places at first mention; flip2: the other one acts."""
            pair = (one, two) if first != flip1 else (two, one)
            acts = third or (one if flip2 else two)
            return {**values, "name_A": pair[0], "name_B": pair[1], "name_C": acts}

        prompt, spans = fill(template, said(io, subject, False, False))
        random_names = counterfactual.startswith("random_names")
        one, two = (others[0], others[1]) if random_names or counterfactual == "abc" else (io, subject)
        flip1, flip2 = "s1_io" in counterfactual, "s2_io" in counterfactual
        changed = said(one, two, flip1, flip2, others[2] if counterfactual == "abc" else None)
        positions: Spans = {
            "IO": spans["name_A" if first else "name_B"], "S1": spans["name_B" if first else "name_A"],
            "S2": spans["name_C"], "END": last_word(prompt),
        }  # fmt: skip
        return Pair(
            prompt=prompt,
            counterfactual=fill(template, changed)[0],
            answers=[f" {io}"],
            foils=[f" {subject}"],
            positions=positions,
            variables={"IO": io, "S": subject, "random_a": others[0], "random_b": others[1], "random_c": others[2]},
            template=f"t{templates.index(template):02d}",
            split=split,
            slices={"order": "ABBA" if first else "BABA"},
        )

    made = draw(200 if n is None else n, rng, make, name="mib_ioi")
    return Made(pairs=made, source=SOURCE, licence=LICENCE)


@generator("mib_mcqa")
def mib_mcqa(
    n: int | None, rng: random.Random, *, data: str = "", counterfactual: str = "symbol", choices: int = 4
) -> Made:
    """Copied colors as multiple choice in MIB's form: "A banana is yellow. What color is a banana?", labels A to D.

    The track's own counterfactual, symbol, has the labels 1 to 4; answerPosition puts the right color at another place,
    randomLetter takes other letters. Answer and foil are the right labels of the two prompts, with no space before
    them, as the track scores them. Slices by place; positions asked and END. Train and test share no object.

    Options
    -------
    data: the folder with MIB's mcqa_object_color_pairs.json.
    counterfactual: symbol, answerPosition, randomLetter or answerPosition_randomLetter.
    choices: how many options (2 to 9).
    """
    one_of("counterfactual", counterfactual, MCQA)
    whole("choices", choices, 2, 9)
    listed = _list(data, "mcqa_object_color_pairs.json")
    try:
        known = halves([(str(one["object"]), str(one["color"])) for one in listed], rng)
    except (KeyError, TypeError) as error:
        raise BehaviorError("MIB's list of objects holds no objects", got=repr(error), wanted="object, color") from None
    colors = sorted({color for side in known.values() for _, color in side})
    whole("choices", choices, 2, min(9, len(colors)))

    def text(thing: str, color: str, labels: list[str], options: list[str]) -> tuple[str, Spans]:
        article = "An" if thing[0].lower() in "aeiou" else "A"
        listed = "\n".join(f"{label}. {option}" for label, option in zip(labels, options, strict=True))
        template = "Question: {article} {thing} is {color}. What color is {small} {asked}?\n{listed}\nAnswer:"
        values = {"article": article, "thing": thing, "color": color, "small": article.lower(), "asked": thing}
        return fill(template, {**values, "listed": listed})

    def make(index: int, split: str, rng: random.Random) -> Pair:
        thing, color = rng.choice(known[split])
        place = index // 2 % choices
        wrong = rng.sample([other for other in colors if other != color], choices - 1)
        options = [*wrong[:place], color, *wrong[place:]]
        letters = [chr(ord("A") + i) for i in range(choices)]
        prompt, spans = text(thing, color, letters, options)
        labels, shown = letters, options
        if counterfactual == "symbol":
            labels = [str(i + 1) for i in range(choices)]
        if "answerPosition" in counterfactual:
            turn = rng.randrange(1, choices)
            shown = [*options[turn:], *options[:turn]]
        if "randomLetter" in counterfactual:
            labels = rng.sample([chr(ord("A") + i) for i in range(choices, 26)], choices)
        return Pair(
            prompt=prompt,
            counterfactual=text(thing, color, labels, shown)[0],
            answers=[letters[place]],
            foils=[labels[shown.index(color)]],
            positions={"asked": spans["asked"], "END": (len(prompt) - len("Answer:"), len(prompt))},
            variables={"color": color, "label": letters[place], "place": place + 1},
            template=f"{choices} choices",
            split=split,
            slices={"place": str(place + 1)},
        )

    made = draw(160 if n is None else n, rng, make, name="mib_mcqa")
    return Made(pairs=made, source=SOURCE, licence=LICENCE)


@generator("mib_arithmetic")
def mib_arithmetic(
    n: int | None, rng: random.Random, *, operation: str = "+", counterfactual: str = "random", digits: int = 2
) -> Made:
    """Arithmetic in MIB's form: sums or differences of two numbers in six templates, the result as the next token.

    The track's own counterfactual, random, asks about two other numbers in the same words; the others change one digit
    of one operand, or whether the ones (the tens) carry. Answer and foil are the two results with no space before
    them. The track keeps results of one token only: `headwater.behavior.mib.track_pairs`. Positions a, b and END;
    slices by template. Train and test share no pair of numbers.

    Options
    -------
    operation: "+" or "-".
    counterfactual: one of MIB's seven, without `_counterfactual`.
    digits: digits of the numbers, 1 or 2.
    """
    one_of("operation", operation, ("+", "-"))
    one_of("counterfactual", counterfactual, ARITHMETIC)
    whole("digits", digits, 1, 2)
    low, high = (0, 9) if digits == 1 else (10, 99)
    if digits == 1 and counterfactual not in ("random", "ones_op1", "ones_op2"):
        raise BehaviorError("one-digit numbers have no tens to change", got=f"counterfactual={counterfactual!r}")
    templates = SUMS if operation == "+" else DIFFERENCES

    def solve(a: int, b: int) -> int:
        return a + b if operation == "+" else a - b

    def side(a: int, b: int) -> str:
        return ("train", "test")[(7 * (a + b) + 3 * a * b + abs(a - b)) // 2 % 2]

    def fits(a: int, b: int, c: int, d: int) -> bool:
        tens, ones = (a // 10, b // 10, c // 10, d // 10), (a % 10, b % 10, c % 10, d % 10)
        same = {
            "ones_op1": b == d and tens[0] == tens[2], "ones_op2": a == c and tens[1] == tens[3],
            "tens_op1": b == d and ones[0] == ones[2], "tens_op2": a == c and ones[1] == ones[3],
        }  # fmt: skip
        if counterfactual in same:
            return same[counterfactual]
        if counterfactual == "ones_carry":
            carries = [(x + y > 9) if operation == "+" else x < y for x, y in (ones[:2], ones[2:])]
            return carries[0] != carries[1] and tens[:2] == tens[2:]
        if counterfactual == "tens_carry":
            carries = [(x + y > 99) if operation == "+" else x < y for x, y in ((a, b), (c, d))]
            return carries[0] != carries[1]
        return True

    def make(index: int, split: str, rng: random.Random) -> Pair | None:
        template = templates[index // 2 % len(templates)]
        a, b = rng.randint(low, high), rng.randint(low, high)
        if operation == "-" and a < b:
            a, b = b, a
        others = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(60)]
        if "op1" in counterfactual:
            others = [(c, b) for c in range(low, high + 1)]
        elif "op2" in counterfactual:
            others = [(a, d) for d in range(low, high + 1)]
        elif counterfactual == "ones_carry":
            others = [(a // 10 * 10 + x, b // 10 * 10 + y) for x in range(10) for y in range(10)]
        negative = operation == "-" and counterfactual != "tens_carry"
        others = [
            (c, d) for c, d in others
            if side(c, d) == split and solve(c, d) != solve(a, b) and fits(a, b, c, d) and not (negative and c < d)
        ]  # fmt: skip
        if side(a, b) != split or not others:
            return None
        c, d = rng.choice(others)
        prompt, spans = fill(template, {"x": str(a), "y": str(b)})
        return Pair(
            prompt=prompt,
            counterfactual=fill(template, {"x": str(c), "y": str(d)})[0],
            answers=[str(solve(a, b))],
            foils=[str(solve(c, d))],
            positions={"a": spans["x"], "b": spans["y"], "END": last_word(prompt)},
            variables={"a": a, "b": b, "operation": operation, "result": solve(a, b)},
            template=f"t{templates.index(template)}",
            split=split,
        )

    made = draw(200 if n is None else n, rng, make, name="mib_arithmetic")
    return Made(pairs=made, source="six forms of Stolfo et al. (2023), as in MIB", licence=LICENCE)
