"""Numbers and untrusted text as a reader sees them."""

import math

import pytest

from headwater.report.words import (
    beside,
    count,
    duration,
    estimate,
    listing,
    middle_95,
    node_parts,
    number,
    p_value,
    percent,
    visible,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.71, "0.71"),
        (4.2134, "4.21"),
        (-3.1, "−3.1"),
        (0.0, "0"),
        (1.0, "1"),
        (12345.6, "12,346"),
        (1234, "1,234"),
        (0.00012, "1.20e−04"),
        (math.nan, "–"),
        (math.inf, "–"),
        (None, "–"),
        (True, "–"),
    ],
)
def test_numbers_have_three_digits_and_no_noise(value: object, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0483, "4.8%"),
        (1.0, "100%"),
        (0.94, "94%"),
        (0.995, "99.5%"),
        (0.9999, "100%"),
        (0.0004, "0.04%"),
        (0.0, "0%"),
        (None, "–"),
    ],
)
def test_shares(value: object, text: str) -> None:
    assert percent(value) == text


def test_p_values_never_read_as_zero() -> None:
    assert [p_value(p) for p in (0.0, 0.0004, 0.012, 0.21, None)] == ["< 0.001", "< 0.001", "0.012", "0.21", "–"]


def test_times() -> None:
    assert [duration(s) for s in (3.21, 41.5, 374, 4000, None)] == ["3.2 s", "42 s", "6 min 14 s", "1 h 06 min", "–"]


def test_lists_and_counts() -> None:
    assert listing([]) == ""
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert [count(n, "head") for n in (0, 1, 2)] == ["no heads", "1 head", "2 heads"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0.7134, 0.6312, 0.7921), "0.71 [0.63, 0.79]"),
        ((-0.00098, -0.00212, 0.0000309), "−0.001 [−0.0021, 0]"),
        ((1.0082, 0.9991, 1.0163), "1.008 [0.999, 1.016]"),
        ((21.34, 20.1, 22.6), "21.3 [20.1, 22.6]"),
        ((0.5, 0.5, 0.5), "0.5 [0.5, 0.5]"),
        ((-0.0004, -1.0, 1.0), "0 [−1, 1]"),
        ((0.2, None, None), "0.2"),
        ((None, 0.1, 0.2), "–"),
    ],
)
def test_an_estimate_shows_no_more_digits_than_its_interval_can_tell(given: tuple[float, ...], text: str) -> None:
    assert estimate(*given) == text


def test_a_null_is_rounded_as_the_estimate_beside_it() -> None:
    assert beside(1.19e-05, 0.72, 0.87) == "0"
    assert beside(0.2084, 0.72, 0.87) == "0.21"
    assert beside(1.19e-05, None, None) == "1.19e−05"


def test_nothing_invisible_is_left_in_text() -> None:
    assert visible("a\u202eb\u2066c\x00d\ne\tf") == "a\\u202eb\\u2066c\\u0000d↵e→f"
    assert visible("\ud800") == "\\ud800"
    assert visible("naïve ␣ 日本 🙂") == "naïve ␣ 日本 🙂"
    assert visible("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    ("name", "sort", "layer", "head", "port", "pos"),
    [
        ("a5.h3", "head", 5, 3, None, None),
        ("a5.h3<q>", "head", 5, 3, "q", None),
        ("a5.g1<k>", "group", 5, 1, "k", None),
        ("m12", "mlp", 12, None, None, None),
        ("a5.h3@S2", "head", 5, 3, None, "S2"),
        ("input", "input", None, None, None, None),
        ("logits", "logits", None, None, None, None),
        ("f7.1201", "other", None, None, None, None),
    ],
)
def test_names_of_nodes(
    name: str, sort: str, layer: int | None, head: int | None, port: str | None, pos: str | None
) -> None:
    assert node_parts(name) == {"sort": sort, "layer": layer, "head": head, "port": port, "pos": pos}


def test_the_middle_of_draws() -> None:
    assert middle_95([]) is None
    assert middle_95([3.0]) == (3.0, 3.0)
    assert middle_95([float(i) for i in range(101)]) == (2.0, 98.0)
