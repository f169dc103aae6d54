"""MIB's causal-variable track (Mueller et al., 2025): does a subspace carry one variable of a causal model?

Reads its rows (prompt, choices, answerKey, and one `..._counterfactual` of the same form for each kind) and makes
multiple-choice, IOI and arithmetic pairs in the same shape from the published lists.
"""

import random
import string
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from headwater.behavior.table import Behavior
from headwater.bench.published.files import read_list
from headwater.bench.published.interchange import (
    Interchange,
    base_vectors,
    first_token,
    fit_subspace,
    known,
    source_vectors,
    swapped,
)
from headwater.bench.published.result import SCHEMA, PublishedScores, score_row
from headwater.core.errors import BehaviorError
from headwater.core.model import Model
from headwater.core.results import Provenance

COUNTERFACTUAL = "_counterfactual"


def read_rows(path: str | Path, counterfactual: str, *, variable: str = "answer") -> list[Interchange]:
    """Interchanges from a JSON or JSONL export of a MIB data set.

    counterfactual: the kind, such as `answerPosition`. variable: what is swapped: "answer" expects the source's answer,
    "answer_pointer" (multiple choice) the base's symbol at the source's place. Raises BehaviorError.
    """
    rows = read_list(path, "MIB")
    name = counterfactual.removesuffix(COUNTERFACTUAL) + COUNTERFACTUAL
    pairs = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"prompt", "choices", "answerKey", name} <= set(row):
            raise BehaviorError(
                f"row {number} is no row of MIB",
                got=sorted(row) if isinstance(row, dict) else type(row).__name__,
                wanted=f"prompt, choices, answerKey, {name}",
            )
        pairs.append(_interchange(row, row[name], variable))
    return pairs


def _symbols(row: dict[str, Any]) -> list[str]:
    choices = row["choices"]
    return list(choices["label"] if isinstance(choices, dict) else choices)


def _interchange(row: dict[str, Any], other: dict[str, Any], variable: str) -> Interchange:
    own, theirs = _symbols(row), _symbols(other)
    answer, source_answer = own[row["answerKey"]], theirs[other["answerKey"]]
    expected = own[other["answerKey"]] if variable == "answer_pointer" else source_answer
    return Interchange(
        base=row["prompt"],
        source=other["prompt"],
        answer=f" {answer}",
        expected=f" {expected}",
        source_answer=f" {source_answer}",
        label=str(row["answerKey"]) if variable == "answer_pointer" else answer,
        source_label=str(other["answerKey"]) if variable == "answer_pointer" else source_answer,
        group=variable,
    )


def multiple_choice(
    path: str | Path, *, n: int, variable: str = "answer_pointer", choices: int = 4, seed: int = 0
) -> list[Interchange]:
    """`n` pairs of the copied-colors task from the published object-color list.

    The source has the answer at another place and other letters, so that the pointer and the letter lead to different
    answers. Raises BehaviorError for a list that is none.
    """
    rng = random.Random(f"headwater-mib-mcqa:{seed}")
    listed = read_list(path, "MIB")
    if not all(isinstance(x, dict) and {"object", "color"} <= set(x) for x in listed):
        raise BehaviorError(
            f"{Path(path).name} is no list of objects and colors", wanted='[{"object": ..., "color": ...}]'
        )
    colors = sorted({one["color"] for one in listed})

    def question(thing: dict[str, str], place: int, letters: Sequence[str], wrong: Sequence[str]) -> dict[str, Any]:
        shown = [*wrong[:place], thing["color"], *wrong[place:]]
        lines = "\n".join(f"{letter}. {color}" for letter, color in zip(letters, shown, strict=True))
        named, color = thing["object"], thing["color"]
        prompt = f"Question: The {named} is {color}. What color is the {named}?\n{lines}\nAnswer:"
        return {"prompt": prompt, "choices": {"label": list(letters)}, "answerKey": place}

    pairs = []
    for _ in range(n):
        thing = rng.choice(listed)
        wrong = rng.sample([color for color in colors if color != thing["color"]], choices - 1)
        letters = rng.sample(string.ascii_uppercase, 2 * choices)
        place, other = rng.sample(range(choices), 2)
        base = question(thing, place, letters[:choices], wrong)
        pairs.append(_interchange(base, question(thing, other, letters[choices:], wrong), variable))
    return pairs


def indirect_object(folder: str | Path, *, n: int, seed: int = 0) -> list[Interchange]:
    """`n` IOI pairs from the published templates and names; the source has the other person give.

    Swapping which of the two names is the answer (the first or the second, MIB's output position) and swapping the
    answer itself (its output token) lead to the same name; subspaces are fitted to the position.
    """
    folder = Path(folder)
    templates, names, places, objects = (
        read_list(folder / f"ioi_{part}.json", "MIB") for part in ("templates", "names", "places", "objects")
    )
    rng = random.Random(f"headwater-mib-ioi:{seed}")
    pairs = []
    for _ in range(n):
        template, (first, second) = rng.choice(templates), rng.sample(names, 2)
        thing = rng.choice([o for o in objects if (o[0] in "aeiou") == (" an {object}" in template)] or objects)
        values = {"name_A": first, "name_B": second, "place": rng.choice(places), "object": thing}
        giver, receiver = (first, second) if rng.random() < 0.5 else (second, first)
        base, source = (_filled(template, {**values, "name_C": name}) for name in (giver, receiver))
        pairs.append(
            Interchange(
                base=base,
                source=source,
                answer=f" {receiver}",
                expected=f" {giver}",
                source_answer=f" {giver}",
                label="first" if receiver == first else "second",
                source_label="first" if giver == first else "second",
                group="output_position",
            )
        )
    return pairs


def _filled(template: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


def arithmetic(*, n: int, variable: str = "ones_carry", digits: bool = False, seed: int = 0) -> list[Interchange]:
    """`n` pairs of two-digit sums: swapping the carry of the ones gives the base's sum with ten more or less.

    Pairs differ in their carry and in the tens digit that the swap should lead to. Sums have two digits, and are read
    by their first token; digits: for tokenizers that have one token a digit, the prompt ends with the space before the
    sum (otherwise that space would be the first token of every sum, and no pair would be left).
    """
    rng = random.Random(f"headwater-mib-arithmetic:{seed}")
    pairs: list[Interchange] = []
    end, space = (" ", "") if digits else ("", " ")
    while len(pairs) < n:
        a, b, c, d = (rng.randrange(11, 45) for _ in range(4))
        carry, other = ((x % 10 + y % 10) // 10 for x, y in ((a, b), (c, d)))
        swapped_sum = a + b + 10 * (other - carry)
        if carry == other or not 10 <= swapped_sum <= 99:
            continue
        base, source = (f"The sum of {x} and {y} is{end}" for x, y in ((a, b), (c, d)))
        pairs.append(
            Interchange(
                base=base,
                source=source,
                answer=f"{space}{a + b}",
                expected=f"{space}{swapped_sum}",
                source_answer=f"{space}{c + d}",
                label=str(carry),
                source_label=str(other),
                group=variable,
            )
        )
    return pairs


def as_behavior(pairs: Sequence[Interchange], *, name: str) -> Behavior:
    """The pairs as a Behavior (counterfactual: the source; foil: what the swap should lead to)."""
    rows = [
        {
            "prompt": p.base,
            "counterfactual": p.source,
            "answers": [p.answer],
            "foils": [p.expected],
            "variables": {"value": p.label, "counterfactual_value": p.source_label},
            "template": p.group,
        }
        for p in pairs
    ]
    return Behavior.from_rows(rows, name=name, about={"benchmark": "MIB causal variables"})


def causal_variable(
    model: Model,
    pairs: Sequence[Interchange],
    *,
    site: str,
    methods: Sequence[str] = ("full", "pca", "mean", "probe", "random"),
    bases: dict[str, torch.Tensor | None] | None = None,
    rank: int = 4,
    only_known: bool = True,
    seed: int = 0,
) -> PublishedScores:
    """Interchange-intervention accuracy of subspaces at a site: the share of swaps after which the model says what the
    causal model says.

    After Mueller et al. (2025), with the first token of an answer read at the end of the prompt. Half of the pairs
    fit the subspaces, half judge them. only_known: keep the pairs whose two prompts the model answers rightly;
    `accuracy` is the share of pairs where it does. Raises BehaviorError where nothing is left.

    Known failure: at the last token of the last layers the full vector carries every answer, so that for a variable
    that is the answer itself a high score there says nothing of where it was found.
    """
    began = time.perf_counter()
    dropped: Counter[str] = Counter()
    usable = []
    for pair in pairs:
        ids = [first_token(model, pair.base, text) for text in (pair.answer, pair.expected)]
        if None in ids or ids[0] == ids[1]:
            dropped["the answers begin with no or the same token"] += 1
        else:
            usable.append((pair, ids))
    if len(usable) < 4:
        raise BehaviorError("too few pairs fit this tokenizer", got=f"{len(usable)} of {len(pairs)}; {dict(dropped)}")
    half = len(usable) // 2
    train, tested = usable[:half], usable[half:]
    right = known(model, [pair for pair, _ in tested])
    if only_known:
        tested = [one for one, both in zip(tested, right, strict=True) if both]
        dropped["the model does not know it"] += right.count(False)
    if not tested:
        raise BehaviorError(
            "the model answers none of these prompts",
            got=f"accuracy 0 on {len(right)} prompts",
            fix="Take another task or model, or only_known=False",
        )
    some = [pair for pair, _ in train]
    x = torch.cat([base_vectors(model, site, some), source_vectors(model, site, some)])
    labels = [pair.label for pair in some] + [pair.source_label for pair in some]
    chosen = {name: fit_subspace(name, x, labels, rank=rank, seed=seed) for name in methods} | dict(bases or {})
    judged, wanted = [pair for pair, _ in tested], torch.tensor([ids[1] for _, ids in tested])
    source = source_vectors(model, site, judged)
    rows = []
    for name, basis in chosen.items():
        said = swapped(model, site, judged, basis, source=source).argmax(-1)
        hits = (said == wanted).float().tolist()
        rows.append(
            score_row(judged[0].group, name, site, "end" if judged[0].base_end is None else "named", "iia", hits)
        )
    return PublishedScores(
        tables={"scores": pl.DataFrame(rows, schema=SCHEMA)},
        facts={"benchmark": "MIB causal variables", "accuracy": sum(right) / len(right), "dropped": dict(dropped)},
        config={"site": site, "rank": rank, "only_known": only_known, "seed": seed},
        provenance=Provenance.collect(model, seed=seed, seconds=time.perf_counter() - began),
    )
