"""Successor: "In order: Monday, Tuesday, Wednesday," -> " Thursday": what comes next in a series everybody knows."""

import random

from headwater.behavior.generators import Made, Pair, fill, generator, halves, last_word, one_of, words
from headwater.core.errors import BehaviorError

# name -> (the series, whether it begins again after its end)
SERIES = {
    "days": (words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"), True),
    "months": (
        words("January February March April May June July August September October November December"),
        True,
    ),
    # As words: many tokenizers have no tokens of more than one digit, and a space before a digit is a token of its own.
    "numbers": (
        words("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"),
        False,
    ),
}
TEMPLATES = (
    "In order: {items},",
    "The list goes {items},",
    "They follow in order: {items} and",
    "One after another: {items}, and then",
)
_RUNS = (2, 3, 4)


@generator("successor")
def successor(n: int | None, rng: random.Random, *, series: str = "all") -> Made:
    """Successor: the next day, month or number of a series.

    The counterfactual is a run of the same series and length from elsewhere; what comes next there is the foil. Each
    prompt offers several, and binding takes the first with as many tokens. Positions last (the last item) and END;
    slices by series, template and length of the run. Train and test share no next item in a series.

    Options
    -------
    series: "days", "months", "numbers" or "all".
    """
    one_of("series", series, (*SERIES, "all"))
    chosen = sorted(SERIES) if series == "all" else [series]
    pairs: dict[str, list[Pair]] = {"train": [], "test": []}
    for name in chosen:
        items, cyclic = SERIES[name]
        nexts = halves(range(len(items)), rng)
        for split, starts in nexts.items():
            for template in range(len(TEMPLATES)):
                for run in _RUNS:
                    for at in starts:
                        others = [other for other in starts if other != at and (cyclic or other >= run)]
                        if others and (cyclic or at >= run):
                            rng.shuffle(others)
                            pairs[split].append(_pair(name, template, run, split, at, others))
    for found in pairs.values():
        rng.shuffle(found)
    most = 2 * min(map(len, pairs.values()))
    n = min(120, most) if n is None else n
    if n > most:
        raise BehaviorError(
            "the behavior 'successor' cannot make so many different prompts", got=f"n={n}", wanted=f"at most {most}"
        )
    order = [pairs[("train", "test")[index % 2]][index // 2] for index in range(n)]
    return Made(pairs=order)


def _pair(name: str, template: int, run: int, split: str, at: int, others: list[int]) -> Pair:
    items, _cyclic = SERIES[name]

    def ask(next_item: int) -> str:
        shown = ", ".join(items[(next_item - run + i) % len(items)] for i in range(run))
        return fill(TEMPLATES[template], {"items": shown})[0]

    prompt = ask(at)
    last = items[(at - 1) % len(items)]
    end = prompt.rindex(last) + len(last)
    offered = [(ask(other), [f" {items[other]}"]) for other in others]
    return Pair(
        prompt=prompt,
        counterfactual=offered[0][0],
        answers=[f" {items[at]}"],
        foils=offered[0][1],
        positions={"last": (end - len(last), end), "END": last_word(prompt)},
        variables={"series": name, "next": items[at], "run": run},
        template=f"t{template:02d}",
        split=split,
        slices={"series": name, "run": str(run)},
        alternatives=offered[1:],
    )
