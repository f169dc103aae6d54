"""Agreement: "The keys to the cabinet" -> " are": the verb agrees with its subject, not with the nearest noun."""

import json
import random
from pathlib import Path

from headwater.behavior.generators import SPLITS, Made, Pair, draw, generator, halves, one_of, words
from headwater.core.errors import BehaviorError

PEOPLE = words("""
    athlete boy carpenter doctor farmer father friend girl guy kid lawyer mother pilot poet singer student teacher
    uncle aunt king queen author actor writer driver player worker leader
""")
THINGS = words("bike car cat chair desk dog table tree truck window box book door house letter picture tower garden")
PREPOSITIONS = words("near behind beside by")
# singular, plural
VERBS = ((" is", " are"), (" has", " have"), (" does", " do"), (" was", " were"))
STRUCTURES = ("simple", "across")


@generator("agreement")
def agreement(n: int | None, rng: random.Random, *, structure: str = "both", folder: str | None = None) -> Made:
    """Subject-verb agreement: is the verb singular or plural, also across another noun?

    The counterfactual has the subject in the other number, so that the foil becomes the answer. Positions subject,
    noun (the one between, where there is one) and END; slices by structure, number of the subject, and whether the noun
    between agrees with it. Train and test share no subject.

    Options
    -------
    structure: "simple" ("The keys"), "across" a noun phrase ("The keys near the cabinet"), or "both" in turn.
    folder: read the pairs from a folder of `simple_train.json`, `nounpp_test.json` and the like (the files of Marks et
        al. 2024, one JSON object a line) in place of headwater's own; `n` pairs of the structure are drawn from them.
    """
    one_of("structure", structure, (*STRUCTURES, "both"))
    if folder is not None:
        return _from_folder(n, rng, structure, Path(folder))
    people = halves(PEOPLE, rng)

    def make(index: int, split: str, rng: random.Random) -> Pair:
        kind = structure if structure != "both" else STRUCTURES[index // 2 % 2]
        noun, plural = rng.choice(people[split]), rng.random() < 0.5
        singular_verb, plural_verb = rng.choice(VERBS)
        subject, other = (noun + "s", noun) if plural else (noun, noun + "s")
        rest = between = ""
        if kind == "across":
            between = _plural(rng.choice(THINGS)) if rng.random() < 0.5 else rng.choice(THINGS)
            rest = f" {rng.choice(PREPOSITIONS)} the {between}"
        prompt = f"The {subject}{rest}"
        end = len("The ") + len(subject)
        positions = {"subject": (4, end), "END": (prompt.rindex(" ") + 1, len(prompt))}
        if between:
            positions["noun"] = (len(prompt) - len(between), len(prompt))
        between_plural = between.endswith("s")
        agrees = "none" if not between else "yes" if between_plural == plural else "no"
        return Pair(
            prompt=prompt,
            counterfactual=f"The {other}{rest}",
            answers=[plural_verb if plural else singular_verb],
            foils=[singular_verb if plural else plural_verb],
            positions=positions,
            variables={"subject": noun, "plural": plural, "verb": singular_verb.strip()},
            template=kind,
            split=split,
            slices={"number": "plural" if plural else "singular", "noun_agrees": agrees},
        )

    return Made(pairs=draw(100 if n is None else n, rng, make, name="agreement"))


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("x") else "s")


def _from_folder(n: int | None, rng: random.Random, structure: str, folder: Path) -> Made:
    kinds = {"simple": ("simple",), "across": ("nounpp",), "both": ("simple", "nounpp")}[structure]
    found: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for kind in kinds:
        for split in SPLITS:
            file = folder / f"{kind}_{split}.json"
            for number, line in enumerate(_lines(file), 1):
                pair = _from_line(line, f"{file.name}, line {number}", kind, split)
                if pair.prompt not in seen:
                    seen.add(pair.prompt)
                    found[split].append(pair)
    for pairs in found.values():
        rng.shuffle(pairs)
    have = 2 * min(map(len, found.values()))
    if n is not None and n > have:
        raise BehaviorError(
            "the folder holds fewer different pairs", got=f"n={n}", wanted=f"at most {have}, half for each split"
        )
    n = min(100, have) if n is None else n
    pairs = [found[SPLITS[index % 2]][index // 2] for index in range(n)]
    return Made(pairs=pairs, source=f"files in {folder.name}", licence="MIT (saprmarks/feature-circuits)")


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BehaviorError(
            "cannot read the agreement pairs", got=f"{file}: {error}", wanted="simple_train.json and the like"
        ) from None


def _from_line(line: str, where: str, kind: str, split: str) -> Pair:
    try:
        row = json.loads(line)
        prompt, counterfactual = row["clean_prefix"], row["patch_prefix"]
        answer, foil, case = row["clean_answer"], row["patch_answer"], row["case"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BehaviorError(
            f"{where}: not a pair",
            got=repr(error),
            wanted="clean_prefix, patch_prefix, clean_answer, patch_answer, case",
        ) from None
    numbers = str(case).split("_")
    agrees = "none" if len(numbers) < 2 else "yes" if numbers[0] == numbers[1] else "no"
    subject = prompt.find(" ", 4)
    return Pair(
        prompt=prompt,
        counterfactual=counterfactual,
        answers=[answer],
        foils=[foil],
        positions={
            "subject": (4, subject if subject > 0 else len(prompt)),
            "END": (prompt.rindex(" ") + 1, len(prompt)),
        },
        variables={"case": case},
        template="across" if kind == "nounpp" else kind,
        split=split,
        slices={"number": numbers[0], "noun_agrees": agrees},
    )
