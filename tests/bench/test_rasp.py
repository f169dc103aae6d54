"""RASP: what programs mean, and that every expression a transformer cannot compute is named."""

from fractions import Fraction
from typing import Any

import pytest

from headwater.bench.rasp import (
    ALWAYS,
    EQ,
    LE,
    LT,
    NEVER,
    Aggregate,
    Constant,
    LinearSequenceMap,
    Map,
    RaspError,
    Select,
    SelectorWidth,
    SequenceMap,
    SOp,
    categorical,
    evaluate,
    indices,
    numerical,
    tokens,
)
from headwater.bench.rasp.compiler import CompileConfig, all_inputs, compile_program

SAME = Select(tokens, tokens, EQ)
ALL = Select(tokens, tokens, ALWAYS)
IS_A = Map(lambda t: int(t == "a"), tokens, encoding="numerical", label="is_a")


@pytest.mark.parametrize(
    ("program", "inputs", "wanted"),
    [
        (tokens, "aba", ["a", "b", "a"]),
        (indices, "aba", [0, 1, 2]),
        (Constant(3), "ab", [3, 3]),
        (indices + 1, "ab", [1, 2]),
        (3 - indices, "ab", [3, 2]),
        (indices * indices, "abc", [0, 1, 4]),
        (SelectorWidth(SAME), "aba", [2, 1, 2]),
        (SelectorWidth(Select(tokens, tokens, NEVER)), "aba", [0, 0, 0]),
        (SelectorWidth(SAME & Select(indices, indices, LT)), "aba", [0, 0, 1]),
        (SelectorWidth(~SAME), "aba", [1, 2, 1]),
        (SelectorWidth(SAME | Select(indices, indices, EQ)), "aba", [2, 1, 2]),
        (Aggregate(ALL, IS_A), "aba", [Fraction(2, 3)] * 3),
        (Aggregate(Select(indices, indices, LE), IS_A), "aba", [1, Fraction(1, 2), Fraction(2, 3)]),
        (Aggregate(Select(tokens, tokens, NEVER), IS_A), "ab", [0, 0]),
        (Aggregate(Select(tokens, tokens, NEVER), tokens), "ab", [None, None]),
        (Aggregate(Select(tokens, tokens, NEVER), tokens, "z"), "ab", ["z", "z"]),
        (Aggregate(Select(indices, indices, lambda k, q: k == q - 1), tokens), "abc", [None, "a", "b"]),
        (LinearSequenceMap(IS_A, numerical(indices), 2, -0.5), "aa", [2, Fraction(3, 2)]),
        (Map(lambda x: None if x == "a" else x, tokens), "ab", [None, "b"]),
    ],
)
def test_what_programs_mean(program: SOp, inputs: str, wanted: list[Any]) -> None:
    assert evaluate(program, inputs) == wanted


def test_causal_programs_do_not_look_ahead() -> None:
    assert evaluate(SelectorWidth(SAME), "aba", causal=True) == [1, 1, 2]


def test_an_aggregate_of_different_categories_has_no_meaning() -> None:
    everything = Aggregate(ALL, tokens, label="everything")
    assert evaluate(everything, "aa") == ["a", "a"]
    with pytest.raises(RaspError, match="everything selects several different values"):
        evaluate(everything, "ab")


OPS = {"categorical": SelectorWidth(SAME, label="often"), "numerical": Aggregate(ALL, IS_A, label="share")}


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (SelectorWidth(~SAME), "`not` cannot be compiled"),
        (SelectorWidth(SAME | ALL), "`or` cannot be compiled"),
        (SAME, "a program gives a value at each position"),
        (SelectorWidth(Select(OPS["numerical"], tokens, EQ)), "key of the selector .* is numerical"),
        (SelectorWidth(Select(tokens, OPS["numerical"], EQ)), "query of the selector .* is numerical"),
        (SequenceMap(lambda x, y: x, OPS["numerical"], tokens, label="mixed"), "mixed reads the numerical share"),
        (LinearSequenceMap(OPS["numerical"], OPS["categorical"], label="sum"), "sum adds up the categorical often"),
        (numerical(tokens), "no number"),
        (Aggregate(ALL, IS_A, default="x", label="odd"), "odd has a value that is no number"),
        (Map(lambda x: x + 1, tokens, label="plus"), "function of plus fails"),
        (SelectorWidth(Select(tokens, indices, LT, label="order")), "function of order fails"),
        (SelectorWidth(Select(tokens, indices, lambda k, q: "yes")), "neither true nor false"),
        (Map(lambda t: f"{t} {t}", tokens), "has to be one word"),
        (Map(lambda t: t if t == "a" else (1 if t == "b" else "1"), tokens), "spelled alike"),
    ],
)
def test_what_cannot_be_compiled_is_named(program: Any, said: str) -> None:
    with pytest.raises(RaspError, match=said):
        compile_program(program, "abc")


def test_everything_that_cannot_be_compiled_is_named_at_once() -> None:
    """Each fault by itself; what reads a faulty expression is none of its own."""
    plus = Map(lambda x: x + 1, tokens, label="plus")
    reader = Map(lambda x: x, plus, label="reader")
    program = SequenceMap(lambda x, y: x, reader, SelectorWidth(~SAME, label="others"), label="both")
    with pytest.raises(RaspError) as found:
        compile_program(program, "abc")
    said = str(found.value)
    assert "2 expressions" in said and "function of plus fails" in said and "`not` cannot be compiled" in said
    assert "reader" not in said and "both" not in said and "others" not in said
    assert "Put the condition into the predicate" in said


def test_too_many_numbers_to_tell_apart_are_refused_only_where_it_matters() -> None:
    digits = numerical(Map(lambda t: {"a": 1, "b": 97, "c": 1009}[t], tokens, label="digit"))
    mean = Aggregate(Select(indices, indices, LE), digits, label="mean")
    big = LinearSequenceMap(LinearSequenceMap(mean, mean, 1, 31), Aggregate(ALL, digits), 7, 11, label="big")
    with pytest.raises(RaspError, match="big may have too many values"):
        compile_program(Map(lambda x: x > 0, big), "abc")


@pytest.mark.parametrize("options", [{"max_length": 3}, {"sharpness": 1.0}, {"scratch": 0}, {"spare_heads": -1}])
def test_a_misfit_config_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RaspError):
        CompileConfig(**options)


def test_an_expression_is_no_condition() -> None:
    with pytest.raises(RaspError, match="no truth value"):
        bool(tokens)


def test_defaults_constants_and_undefined_values_compile() -> None:
    """Where nothing is selected: the default, also read by later heads; at the first token nothing leaks."""
    back = Select(indices, indices, lambda k, q: k == q - 2)
    for default in (None, "z"):
        twice = Aggregate(back, Aggregate(back, tokens, default, label="one"), default, label="two")
        assert compile_program(twice, "abc").mistakes(all_inputs("abc", 5)) == []
    share = Aggregate(back, IS_A, 5, label="share")
    assert compile_program(share, "ab").mistakes(all_inputs("ab", 5)) == []
    again = Aggregate(back, categorical(share), label="again")
    assert compile_program(again, "ab").mistakes(all_inputs("ab", 5)) == []
    some = Map(lambda t: None if t == "a" else t, tokens, label="some")
    counted = SelectorWidth(Select(some, some, ALWAYS), label="counted")
    assert compile_program(counted, "abc").mistakes(all_inputs("abc", 4)) == []
    assert (
        compile_program(SequenceMap(lambda x, y: x + y, Constant(2), indices), "ab").mistakes(all_inputs("ab", 4)) == []
    )
    assert compile_program(Constant("k"), "ab").mistakes(all_inputs("ab", 3)) == []
    assert compile_program(tokens, "ab").mistakes(all_inputs("ab", 3)) == []


def test_numbers_compile() -> None:
    halves = LinearSequenceMap(IS_A, numerical(indices), 3, -0.5, label="halves")
    assert compile_program(halves, "ab").mistakes(all_inputs("ab", 5)) == []
    doubled = LinearSequenceMap(halves, halves, 2, 1, label="doubled")
    assert compile_program(Map(lambda x: x > 1, doubled), "ab").mistakes(all_inputs("ab", 5)) == []
    width = numerical(SelectorWidth(SAME, label="often"))
    assert compile_program(Aggregate(ALL, width, label="mean"), "ab").mistakes(all_inputs("ab", 5)) == []
