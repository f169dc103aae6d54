"""Capitals: "The capital of France is" -> " Paris", from a table of real countries."""

import csv
import functools
import random
from importlib.resources import files

from headwater.behavior.generators import Made, Pair, fill, generator, halves, last_word, whole
from headwater.core.errors import BehaviorError

TEMPLATES = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "In {country}, the capital is",
)
# How many other countries are offered as counterfactual: binding takes the first with as many tokens.
_OFFERED = 16


@functools.cache
def facts() -> dict[str, tuple[str, str]]:
    """country -> (capital, region); see data/SOURCES.md for source and licence."""
    text = (files("headwater.behavior.generators") / "data" / "capitals.csv").read_text(encoding="utf-8")
    return {row["country"]: (row["capital"], row["region"]) for row in csv.DictReader(text.splitlines())}


@generator("capitals")
def capitals(n: int | None, rng: random.Random, *, shots: int = 0) -> Made:
    """Capitals of countries, real facts: which city comes after "The capital of France is"?

    The counterfactual asks for another country, whose capital is the foil. Each prompt offers several, the likeliest
    to have as many tokens first; binding takes the first that does. Positions country and END; slices by template and
    region. Train and test share no country. Without `n`, each country is asked once.

    Options
    -------
    shots: how many solved examples stand before the question (0 to 8); their countries are never asked for.
    """
    whole("shots", shots, 0, 8)
    known = facts()
    examples = rng.sample(sorted(known), shots)
    asked = halves((country for country in sorted(known) if country not in examples), rng)
    total = sum(map(len, asked.values()))
    n = total if n is None else n
    if n > total * len(TEMPLATES):
        raise BehaviorError(
            "the behavior 'capitals' cannot make so many different prompts",
            got=f"n={n}",
            wanted=f"at most {total * len(TEMPLATES)}: {total} countries in {len(TEMPLATES)} templates",
        )
    pairs: list[Pair] = []
    for index, template in enumerate(TEMPLATES):
        shown = "".join(f"{fill(template, {'country': e})[0]} {known[e][0]}.\n" for e in examples)
        # train and test in turn; one half may have a country more
        for place in range(max(map(len, asked.values()))):
            for split, countries in asked.items():
                if place < len(countries) and len(pairs) < n:
                    others = _like(countries[place], countries, rng)
                    pairs.append(_pair(f"t{index:02d}", shown + template, split, countries[place], others))
    return Made(pairs=pairs, source="countryinfo 1.0.1, an extract", licence="MIT (data/SOURCES.md)")


def _pair(name: str, template: str, split: str, country: str, others: list[str]) -> Pair:
    known = facts()
    prompt, spans = fill(template, {"country": country})
    offered = [(fill(template, {"country": other})[0], [f" {known[other][0]}"]) for other in others]
    return Pair(
        prompt=prompt,
        counterfactual=offered[0][0],
        answers=[f" {known[country][0]}"],
        foils=offered[0][1],
        positions={"country": spans["country"], "END": last_word(prompt)},
        variables={"country": country, "capital": known[country][0]},
        template=name,
        split=split,
        slices={"region": known[country][1]},
        alternatives=offered[1:],
    )


def _like(country: str, countries: list[str], rng: random.Random) -> list[str]:
    """Other countries, those of like spelling length first; their capitals begin differently."""
    known = facts()
    start = known[country][0][:3]
    others = [other for other in countries if other != country and known[other][0][:3] != start]
    rng.shuffle(others)
    others.sort(key=lambda other: (other.count(" ") != country.count(" "), abs(len(other) - len(country))))
    return others[:_OFFERED]
