"""Balanced parentheses: "print(abs(len(str(x" -> "))))", how many closers a line of code needs (Rai et al. 2025)."""

import random

from headwater.behavior.generators import Made, Pair, Spans, draw, generator, halves, one_of, whole, words

# Calls that may stand inside each other, and what they are called on: short common words, most of them one token.
CALLS = words("""
    abs all any bin bool chr dict float hex int iter len list max min next oct ord repr round set sorted str sum tuple
    type zip map filter range
""")
THINGS = words("a b c d e f g h i j k m n p q r s t u v w x y z data value text items name key line word count total")
# What may stand in place of an opening parenthesis, which then needs no closer: the same tokens but for one.
JOINTS = ("+", ",", "-", "*", "/", "|")


@generator("parentheses")
def parentheses(
    n: int | None, rng: random.Random, *, depth: int = 4, least: int = 1, shots: int = 2, joint: str = "any"
) -> Made:
    """Balanced parentheses: a line of nested calls ends where they are to be closed; how many closers come next?

    The answer is that many closers as one token; the foils are all other numbers up to `depth`, so the choice is among
    `depth` classes. Tokenizers differ in the closers they have as one token: numbers that begin with the token of
    another are dropped in binding and counted. The counterfactual puts an operator in place of one opening
    parenthesis (or the other way round), so that it needs one closer less (or more) with as many tokens; several are
    offered, and binding takes the first that aligns. Positions outer (the first opener), inner (the last) and END;
    slices by depth. Train and test share no name.

    Options
    -------
    depth: calls of a line, and the largest number of closers (2 to 6).
    least: the smallest number of closers (1 to depth - 1).
    shots: balanced lines that stand before (0 to 8).
    joint: what may stand in place of an opener: "any" or one of + , - * / |
    """
    whole("depth", depth, 2, 6)
    whole("least", least, 1, depth - 1)
    whole("shots", shots, 0, 8)
    one_of("joint", joint, ("any", *JOINTS))
    joints = JOINTS if joint == "any" else (joint,)
    calls, things = halves(CALLS, rng), halves(THINGS, rng)

    def line(rng: random.Random, split: str, needed: int) -> tuple[list[str], list[str], str]:
        """(calls, what stands behind each, the argument): `needed` of what stands there open a call, the first
        always."""
        named = ["print", *rng.sample(calls[split], depth - 1)]
        opened = {0, *rng.sample(range(1, depth), needed - 1)}
        return named, ["(" if at in opened else rng.choice(joints) for at in range(depth)], rng.choice(things[split])

    def make(index: int, split: str, rng: random.Random) -> Pair:
        # depths in turn, the split fastest
        needed = least + index // 2 % (depth - least + 1)
        shown = ""
        for _ in range(shots):
            solved = rng.randint(least, depth)
            shown += _text(*line(rng, split, solved)) + ")" * solved + "\n"
        named, behind, thing = line(rng, split, needed)
        prompt = shown + _text(named, behind, thing)
        others = [(text, count) for text, count in _others(named, behind, thing, joints, rng) if least <= count]
        texts = [
            (shown + text, [")" * count] + [")" * k for k in _numbers(depth, needed, count)]) for text, count in others
        ]
        spans: list[tuple[int, int]] = []
        at = len(shown)
        for name, sign in zip(named, behind, strict=True):
            at += len(name)
            spans.append((at, at + len(sign)))
            at += len(sign)
        opens = [span for span, sign in zip(spans, behind, strict=True) if sign == "("]
        positions: Spans = {"outer": opens[0], "inner": opens[-1], "END": (len(prompt) - len(thing), len(prompt))}
        return Pair(
            prompt=prompt,
            counterfactual=texts[0][0],
            answers=[")" * needed],
            foils=texts[0][1],
            positions=positions,
            variables={"depth": needed, "counterfactual": others[0][1], "thing": thing},
            template=f"{depth} calls",
            split=split,
            slices={"depth": str(needed)},
            alternatives=texts[1:],
        )

    made = draw(100 if n is None else n, rng, make, name="parentheses")
    return Made(pairs=made, note="the first foil is the counterfactual's own answer")


def _text(named: list[str], behind: list[str], thing: str) -> str:
    return "".join(name + sign for name, sign in zip(named, behind, strict=True)) + thing


def _numbers(depth: int, needed: int, first: int) -> list[int]:
    """The other numbers of closers, all but the answer's and the counterfactual's."""
    return [k for k in range(1, depth + 1) if k not in (needed, first)]


def _others(
    named: list[str], behind: list[str], thing: str, joints: tuple[str, ...], rng: random.Random
) -> list[tuple[str, int]]:
    """(text, closers needed) of every line that differs in one sign, in random order: an opener for a joint, or a joint
    for an opener. The first opener stays."""
    needed = behind.count("(")
    found = []
    for at in range(1, len(behind)):
        for sign in joints if behind[at] == "(" else ("(",):
            changed = [*behind[:at], sign, *behind[at + 1 :]]
            found.append((_text(named, changed, thing), needed + (1 if sign == "(" else -1)))
    rng.shuffle(found)
    return found
