"""Context against memory: a text says that the capital of France is Rome; which capital does the model go on with?"""

import random

from headwater.behavior.generators import Made, Pair, fill, generator, halves, last_word
from headwater.behavior.generators.capitals import facts
from headwater.core.errors import BehaviorError

TEMPLATES = (
    "The capital of {country} is {city}. In {country}, the capital is",
    "According to the text, the capital city of {country} is {city}. The capital of {country} is",
    "{city} is the capital of {country}. The capital of {country} is",
)
_DRAWS = 4  # cities that the text may name, for each country and template
_OFFERED = 12  # other cities offered as counterfactual: binding takes the first that has as many tokens


@generator("conflict")
def conflict(n: int | None, rng: random.Random) -> Made:
    """Context against memory: does the model go on with the capital that the text names, or with the one it knows?

    The text names a city that is not the country's capital: that city is the answer, the real capital the foil. The
    counterfactual's text names a third city. Positions context (the city), country, END; slice by template. Train and
    test share no country.
    """
    known = facts()
    parts = halves(sorted(known), rng)
    drawn: dict[str, list[Pair]] = {split: [] for split in parts}
    for split, countries in parts.items():
        made: dict[str, Pair] = {}
        for _draw in range(_DRAWS):
            for index, template in enumerate(TEMPLATES):
                for country in countries:
                    pair = _pair(template, index, country, _cities(country, countries, rng), split)
                    made.setdefault(pair.prompt, pair)
        drawn[split] = list(made.values())
        rng.shuffle(drawn[split])
    total = sum(map(len, drawn.values()))
    n = len(known) if n is None else n
    if n > total:
        raise BehaviorError(
            "the behavior 'conflict' cannot make so many different prompts", got=f"n={n}", wanted=f"at most {total}"
        )
    pairs = [pair for both in zip(drawn["train"], drawn["test"], strict=False) for pair in both]
    rest = {pair.prompt for pair in pairs}
    pairs += [pair for split in drawn.values() for pair in split if pair.prompt not in rest]
    return Made(pairs=pairs[:n], source="countryinfo 1.0.1, an extract", licence="MIT (data/SOURCES.md)")


def _pair(template: str, index: int, country: str, cities: list[str], split: str) -> Pair:
    capital, (city, *others) = facts()[country][0], cities
    prompt, spans = fill(template, {"country": country, "city": city})
    offered = [(fill(template, {"country": country, "city": other})[0], [f" {capital}"]) for other in others]
    return Pair(
        prompt=prompt,
        counterfactual=offered[0][0],
        answers=[f" {city}"],
        foils=offered[0][1],
        positions={"context": spans["city"], "country": spans["country"], "END": last_word(prompt)},
        variables={"country": country, "context": city, "memory": capital},
        template=f"t{index:02d}",
        split=split,
        alternatives=offered[1:],
    )


def _cities(country: str, countries: list[str], rng: random.Random) -> list[str]:
    """A city that the text names, and others to name in its place, those spelled about as long first; none begins as
    the country's capital does, nor as the first."""
    known = facts()
    own = known[country][0]
    cities = [known[other][0] for other in countries if known[other][0][:3] != own[:3]]
    first = rng.choice(cities)
    rest = [city for city in cities if city[:3] != first[:3]]
    rng.shuffle(rest)
    rest.sort(key=lambda city: (city.count(" ") != first.count(" "), abs(len(city) - len(first))))
    return [first, *rest[:_OFFERED]]
