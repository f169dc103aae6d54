"""Facts to rewrite: capitals that shall be others, with other wordings and with neighbors that shall stay."""

import random
from collections.abc import Sequence
from typing import Any

from headwater.behavior.generators import fill
from headwater.behavior.generators.capitals import facts as capital_facts
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

# Countries whose capitals small models know.
KNOWN = (
    "France", "Italy", "Japan", "Egypt", "Spain", "Germany", "Russia", "Greece", "China", "Kenya",
    "Poland", "Cuba", "Peru", "Iraq", "Sweden", "Norway", "Austria", "Portugal", "Ireland", "Canada",
)  # fmt: skip
WRITTEN = "The capital of {subject} is"
PARAPHRASES = (
    "The capital city of {subject} is",
    "The seat of the government of {subject} is the city of",
    "Everybody who has been to {subject} knows that its capital is",
)
NEIGHBORS = 2  # other countries asked for each fact


def rewrites(n: int = 4, *, seed: int = 0, countries: Sequence[str] = KNOWN) -> dict[str, Behavior]:
    """`n` capitals to rewrite, as three behaviors: `facts`, `written` and `neighbors`.

    facts: trained on "The capital of France is" with another capital as its answer and the true one as its foil; tested
    on three other wordings. written: the wording that was trained on, as test pairs (efficacy). neighbors: two other
    countries a fact, whose answer is their own capital and whose foil is the one that was written (specificity). Every
    pair names the position `subject`; its counterfactual asks for another country.

    Raises MethodError for more facts than there are countries.
    """
    known = capital_facts()
    unknown = [country for country in countries if country not in known]
    if unknown:
        raise MethodError("no such country in the table of capitals", got=", ".join(unknown))
    if not 1 <= n <= len(countries) // (1 + NEIGHBORS):
        wanted = f"1 to {len(countries) // (1 + NEIGHBORS)}: each needs {NEIGHBORS} neighbors"
        raise MethodError("cannot rewrite so many facts", got=n, wanted=wanted)
    draw = random.Random(f"headwater-rewrites:{seed}")
    order = list(countries)
    draw.shuffle(order)
    edited, others = order[:n], order[n:]
    rows: dict[str, list[dict[str, Any]]] = {"facts": [], "written": [], "neighbors": []}
    for at, country in enumerate(edited):
        near = others[NEIGHBORS * at : NEIGHBORS * (at + 1)]
        # The last of the others, where it is no neighbor of this fact; else another edited one, or any other at all.
        given = (others[-1 - at], edited[at - 1], *KNOWN)
        new = known[next(one for one in given if one not in (country, *near))][0]
        old = known[country][0]
        asked = [one for one in order if one != country]
        rows["facts"].append(_pair(WRITTEN, country, new, old, asked, "train"))
        rows["facts"] += [_pair(wording, country, new, old, asked, "test") for wording in PARAPHRASES]
        rows["written"].append(_pair(WRITTEN, country, new, old, asked, "test"))
        rows["neighbors"] += [_pair(WRITTEN, one, known[one][0], new, [country], "test") for one in near]
    about = {"generator": "rewrites", "facts": n, "seed": seed, "source": "countryinfo 1.0.1, an extract"}
    return {name: Behavior.from_rows(pairs, name=name, about=about) for name, pairs in rows.items()}


def _pair(wording: str, country: str, answer: str, foil: str, others: list[str], split: str) -> dict[str, Any]:
    prompt, spans = fill(wording, {"subject": country})
    offered = [fill(wording, {"subject": other})[0] for other in others]
    return {
        "id": f"{country}-{split}-{(WRITTEN, *PARAPHRASES).index(wording)}",
        "prompt": prompt,
        "counterfactual": offered[0],
        "alternatives": [{"counterfactual": text, "foils": [f" {foil}"]} for text in offered[1:]],
        "answers": [f" {answer}"],
        "foils": [f" {foil}"],
        "positions": {"subject": list(spans["subject"])},
        "variables": {"subject": country, "answer": answer},
        "split": split,
    }
