"""Greater than: "The war lasted from the year 1732 to the year 17" -> a number above 32 (Hanna et al. 2023)."""

import random

from headwater.behavior.generators import Made, Pair, draw, fill, generator, halves, last_word, one_of, words

EVENTS = words("""
    argument battle campaign conflict dynasty expedition festival journey plague project reign siege strike treaty
    trial voyage war work storm visit
""")
TEMPLATE = "The {event} lasted from the year {century}{year} to the year {century}"
CENTURIES = [str(century) for century in range(11, 18)]
YEARS = range(2, 98)


@generator("greater_than")
def greater_than(n: int | None, rng: random.Random, *, counterfactual: str = "01") -> Made:
    """Greater than: an event that began in 1732 ends in 17.., later than 32.

    The answers are all later two-digit years, the foils all years up to the first, and the metric is the probability
    of the answers minus that of the foils. Under a tokenizer without two-digit tokens, binding scores by the first
    digit: digits above the year's first digit against digits below it, with the digit itself, which tells nothing, on
    neither side. Positions year (its two last digits) and END; slices by century. Train and test share no event.

    Options
    -------
    counterfactual: "01" puts 01 for the first year, so that any year would do; "late" puts a year above all answers'
        middle, so that fewer would.
    """
    one_of("counterfactual", counterfactual, ("01", "late"))
    events = halves(EVENTS, rng)
    numbers = [f"{number:02d}" for number in range(100)]

    def make(index: int, split: str, rng: random.Random) -> Pair:
        event, century, year = rng.choice(events[split]), rng.choice(CENTURIES), rng.choice(YEARS)
        then = 1 if counterfactual == "01" else rng.randrange((year + 100) // 2, 99)
        values = {"event": event, "century": century}
        prompt, spans = fill(TEMPLATE, {**values, "year": f"{year:02d}"})
        return Pair(
            prompt=prompt,
            counterfactual=fill(TEMPLATE, {**values, "year": f"{then:02d}"})[0],
            answers=numbers[year + 1 :],
            foils=numbers[: year + 1],
            positions={"year": spans["year"], "END": last_word(prompt)},
            variables={**values, "year": year},
            template="t00",
            split=split,
            slices={"century": century},
        )

    return Made(pairs=draw(100 if n is None else n, rng, make, name="greater_than"), metric="prob_diff")
