"""Every program of the library, compiled, says what the interpreter says on every short input."""

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from headwater.bench import truth
from headwater.bench.rasp.library import programs
from headwater.core.errors import MethodError

NAMES = {
    "hist": "histogram", "length": "length", "reverse": "reverse", "shift_by": "shift_by_2", "sort": "sort",
    "sort_freq": "sort_by_frequency", "sort_unique": "sort_unique", "frac_prevs": "fraction_of_x",
    "pair_balance": "pair_balance", "shuffle_dyck1": "shuffle_dyck_1", "shuffle_dyck2": "shuffle_dyck_2",
    "detect_pattern_abc": "detect_abc",
}  # fmt: skip


def short_inputs(name: str) -> set[tuple[Any, ...]]:
    """All of them, from the definition: nothing is drawn, and nothing left out but what has no meaning."""
    program = programs.get(name)
    lengths = range(1, program.longest + 1)
    found = {one for length in lengths for one in itertools.product(program.vocabulary, repeat=length)}
    return {one for one in found if program.valid is None or program.valid(one)}


def test_there_are_enough_programs() -> None:
    assert len(truth.names()) >= 20
    assert all(programs.get(name).about.endswith(".") for name in truth.names())
    assert all(programs.get(name).longest >= 4 for name in truth.names())


def test_the_page_says_on_how_many_inputs() -> None:
    """docs/truth.md names the number of inputs that the next test compares."""
    page = (Path(__file__).parents[2] / "docs" / "truth.md").read_text()
    assert f"{sum(len(short_inputs(name)) for name in truth.names()):,} short inputs" in page
    assert f"{len(truth.names())} programs" in page


@pytest.mark.parametrize("name", truth.names())
def test_the_model_says_what_the_interpreter_says(name: str) -> None:
    program = programs.get(name)
    compiled = truth.compile(name)
    inputs = truth.exhaustive(program)
    assert set(inputs) == short_inputs(name) and len(set(inputs)) == len(inputs)
    draw = random.Random(name)
    longer = [[draw.choice(program.vocabulary) for _ in range(length)] for length in (5, 6, 7) for _ in range(40)]
    inputs += [tuple(one) for one in longer if program.valid is None or program.valid(tuple(one))]
    assert len({len(one) for one in inputs}) >= 4
    meant = [compiled.interpret(one) for one in inputs]
    assert len({str(value) for row in meant for value in row}) > 1, "a program that always says the same"
    assert compiled.mistakes(inputs) == []


SEVERAL = {
    "histogram": ("abac", [2, 1, 2, 1]),
    "reverse": ((1, 2, 3), [3, 2, 1]),
    "sort": ((3, 1, 3, 2), [1, 2, 3, 3]),
    "sort_by_frequency": ("abbca", list("abbac")),
    "most_frequent": ("abbca", list("aaaaa")),
    "pair_balance": ("(a)", [1, Fraction(1, 2), 0]),
    "shuffle_dyck_2": ("({)}", [True] * 4),
    "depth": ("(()", [1, 2, 1]),
    "induction": ("abcab", [None, None, None, "b", "c"]),
    "is_palindrome": ("abcba", [True] * 5),
    "parity": ((1, 1, 0, 1), [1, 0, 0, 1]),
    "digit_sum_mod_3": ((2, 2, 1), [2, 2, 2]),
    "detect_abc": ("dabc", [False, False, False, True]),
    "first_occurrence": ("aba", [True, True, False]),
    "distinct": ("abac", [3] * 4),
    "same_frequency": ("abac", [2, 2, 2, 2]),
    "pair_difference": ("xxyz", [1] * 4),
    "maximum": ((2, 4, 1), [4, 4, 4]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_the_interpreter_says_what_the_program_is_for(name: str) -> None:
    inputs, wanted = SEVERAL[name]
    compiled = truth.compile(name)
    assert compiled.interpret(inputs) == wanted
    assert compiled.outputs([inputs]) == [wanted]


def is_same(meant: Any, reference: Any) -> bool:
    if isinstance(meant, int | Fraction) and isinstance(reference, float):
        return abs(float(meant) - reference) < 1e-5
    return meant == reference


@pytest.mark.parametrize("reference", NAMES)
def test_agreement_with_the_reference_compiler(reference: str, shared_data: Path) -> None:
    """What programs compiled by Tracr (Lindner et al., 2023) say; where ours is undefined, theirs says anything."""
    path = shared_data / "tracr" / f"{reference}.json"
    if not path.exists():
        pytest.skip("the reference compiler's outputs are not in ../shared/data/tracr")
    compiled = truth.compile(NAMES[reference], max_length=8)
    valid = programs.get(NAMES[reference]).valid
    compared = 0
    for example in json.loads(path.read_text())["examples"]:
        inputs = example["input"]
        if valid is not None and not valid(tuple(inputs)):
            continue
        (said,) = compiled.outputs([inputs])
        pairs = [(x, y) for x, y in zip(said, example["output"], strict=True) if x is not None]
        assert all(is_same(x, y) for x, y in pairs), (inputs, said, example["output"])
        compared += len(pairs)
    assert compared > 50


def test_an_unknown_program_is_refused_with_near_names() -> None:
    with pytest.raises(MethodError, match="histogram"):
        truth.compile("histogramm")
    with pytest.raises(MethodError, match="max_lenght"):
        truth.compile("histogram", max_lenght=9)
