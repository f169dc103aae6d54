"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary" (Wang et
al. 2022)."""

import random

from headwater.behavior.generators import Made, Pair, Spans, draw, fill, generator, halves, last_word, one_of, words

# Common first names; each is one token after a space in the vocabularies of GPT-2 and SmolLM2.
NAMES = words("""
    Aaron Adam Alexander Allison Amanda Amy Andrea Andrew Angela Anthony Ashley Benjamin Bradley Brian Bryan Charles
    Christina Christine Christopher Crystal Daniel David Elizabeth Emily Eric Erin Gregory Heather Jacob James Jamie
    Jason Jeffrey Jennifer Jeremy Jesse Jessica John Jonathan Jose Joseph Joshua Justin Katherine Katie Kelly Kenneth
    Kevin Laura Lauren Lisa Mark Mary Matthew Melissa Michael Michelle Nathan Nicholas Nicole Patrick Paul Rachel
    Rebecca Richard Robert Ryan Samantha Samuel Sara Sarah Scott Sean Shannon Stephanie Stephen Steven Thomas Timothy
    Tyler William
""")
PLACES = words("store garden restaurant school hospital office house station park bank")
THINGS = words("ring book bone basketball computer necklace drink snack letter coin")
# {first} and {second} are the two names as they are introduced, {S2} the one who gives. No template starts with a
# name: at the start of a text many names are several tokens.
TEMPLATES = (
    "When {first} and {second} went to the {place}, {S2} gave a {thing} to",
    "After {first} and {second} met at the {place}, {S2} handed a {thing} to",
    "While {first} and {second} were at the {place}, {S2} gave a {thing} to",
    "Then, {first} and {second} walked to the {place}. {S2} sent a {thing} to",
    "Later, {first} and {second} arrived at the {place}. {S2} gave a {thing} to",
    "One day, {first} and {second} left the {place} and {S2} gave a {thing} to",
    "Just after {first} and {second} left the {place}, {S2} offered a {thing} to",
    "In the morning, {first} and {second} went to the {place}, and {S2} handed a {thing} to",
    "Yesterday, {first} and {second} worked at the {place}. {S2} gave a {thing} to",
    "The friends {first} and {second} found a {thing} at the {place}. {S2} gave it to",
    "On Monday, {first} and {second} had lunch at the {place}. Afterwards, {S2} gave a {thing} to",
    "Once {first} and {second} finished at the {place}, {S2} presented a {thing} to",
    "Before {first} and {second} went to the {place}, {S2} gave a {thing} to",
    "At the {place}, {first} and {second} were sitting together. {S2} handed a {thing} to",
)


@generator("ioi")
def ioi(n: int | None, rng: random.Random, *, counterfactual: str = "swap", templates: int = len(TEMPLATES)) -> Made:
    """Indirect objects: of two people, who is given the thing? (names, ABBA and BABA)

    The answer is the name said once (IO), the foil the name said twice (S). Positions IO, S1, S2 and END; slices by
    template and by order (ABBA: the indirect object is introduced first). Train and test share no name.

    Options
    -------
    counterfactual: "swap" has the other person give, so that the foil becomes the answer; "abc" has three other
        names, so that no name is said twice and no answer is better than another.
    templates: how many of the templates to use.
    """
    one_of("counterfactual", counterfactual, ("swap", "abc"))
    one_of("templates", templates, range(1, len(TEMPLATES) + 1))
    names = halves(NAMES, rng)

    def make(index: int, split: str, rng: random.Random) -> Pair:
        which, order = rng.randrange(templates), rng.choice(("ABBA", "BABA"))
        io, subject, *others = rng.sample(names[split], 5)
        values: dict[str, str] = {"place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
        first, second = (io, subject) if order == "ABBA" else (subject, io)
        prompt, spans = fill(TEMPLATES[which], {**values, "first": first, "second": second, "S2": subject})
        if counterfactual == "swap":
            names_then = {"first": first, "second": second, "S2": io}
        else:
            names_then = {"first": others[0], "second": others[1], "S2": others[2]}
        positions: Spans = {
            "IO": spans["first" if order == "ABBA" else "second"],
            "S1": spans["second" if order == "ABBA" else "first"],
            "S2": spans["S2"],
            "END": last_word(prompt),
        }
        return Pair(
            prompt=prompt,
            counterfactual=fill(TEMPLATES[which], {**values, **names_then})[0],
            answers=[f" {io}"],
            foils=[f" {subject}"],
            positions=positions,
            variables={"IO": io, "S": subject, "order": order, **values},
            template=f"t{which:02d}",
            split=split,
            slices={"order": order},
        )

    return Made(pairs=draw(200 if n is None else n, rng, make, name="ioi"))
