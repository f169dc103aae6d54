"""Induction: random words, then the same words again; each is followed by what followed it before (Olsson et al.
2022)."""

import random

from headwater.behavior.generators import Made, Pair, Spans, draw, generator, halves, whole, words

# Common nouns, each one token after a space in most vocabularies; where one is several, it is so both times.
WORDS = words("""
    apple bird book box bridge car cat chair city cloud coffee cup day desk dog door field fire fish flower forest
    game garden glass gold hand hat heart hill home horse house ice island key king lake letter light lion machine map
    market milk mirror moon mountain mouse music night ocean paper park picture plane queen rain ring river road rock
    room rose salt school sea ship shirt shoe silver sky snow song star stone storm street sugar summer sun table tea
    tiger tower town train tree truck wall war water wheel wind window winter wood world
""")


@generator("induction")
def induction(n: int | None, rng: random.Random, *, period: int = 10) -> Made:
    """Induction: random words repeated; the next word is the one that came next the first time.

    The counterfactual exchanges, in the first pass, the answer with another word, which is the foil: the same tokens in
    another order. Positions first (where the last word stood the first time), source (where its successor, the answer,
    stood) and END; slices by how far back that is. Train and test share no word.

    Options
    -------
    period: how many words are repeated (4 to 40); with more the pass behind is longer.
    """
    whole("period", period, 4, 40)
    halved = halves(WORDS, rng)

    def make(index: int, split: str, rng: random.Random) -> Pair:
        # A first word that is not repeated: at the start of a text, words lack their space.
        start, *passed = rng.sample(halved[split], period + 1)
        # `at` is the last word of the second pass; the foil comes after the answer, so that under the counterfactual
        # too the second pass repeats the first exactly
        at = rng.randrange(1, period - 2)
        other = rng.randrange(at + 2, period)
        then = list(passed)
        then[at + 1], then[other] = passed[other], passed[at + 1]
        again = passed[: at + 1]
        said = [start, *passed, *again]
        spans: list[tuple[int, int]] = []
        for word in said:
            begin = spans[-1][1] + 1 if spans else 0
            spans.append((begin, begin + len(word)))
        positions: Spans = {"first": spans[at + 1], "source": spans[at + 2], "END": spans[-1]}
        prompt = " ".join(said)
        return Pair(
            prompt=prompt,
            counterfactual=" ".join([start, *then, *again]),
            answers=[f" {passed[at + 1]}"],
            foils=[f" {passed[other]}"],
            positions=positions,
            variables={"word": passed[at], "period": period, "repeated": at + 1},
            template="t00",
            split=split,
            slices={"repeated": f"{at + 1:02d}"},
        )

    return Made(pairs=draw(100 if n is None else n, rng, make, name="induction"))
