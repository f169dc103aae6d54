"""Generators: what they say about their pairs is true of the pairs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import headwater as hw
from headwater.behavior import generators
from headwater.behavior.generators import Made, Pair, fill, halves
from headwater.behavior.generators.capitals import facts
from headwater.behavior.generators.colors import LABELS
from headwater.behavior.generators.successor import SERIES
from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError

NAMES = list(generators.BUILT_IN)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("ioi", {"counterfactual": "abc"}),
    ("ioi", {"templates": 1}),
    ("greater_than", {"counterfactual": "late"}),
    ("capitals", {"shots": 3}),
    ("colors", {"format": "cloze", "things": 2}),
    ("colors", {"format": "choice", "choices": 2, "shots": 3}),
    ("colors", {"format": "cloze", "shots": 2}),
    ("agreement", {"structure": "across"}),
    ("induction", {"period": 5}),
    ("successor", {"series": "days"}),
    ("arithmetic", {"digits": 1}),
    ("arithmetic", {"operation": "both", "shots": 0}),
    ("parentheses", {"depth": 2, "shots": 0}),
    ("parentheses", {"depth": 6, "least": 3, "joint": "+"}),
]


def rows_of(behavior: Behavior) -> list[dict[str, Any]]:
    rows = behavior.frame.to_dicts()
    for row in rows:
        row["spans"] = json.loads(row["positions"])
        row["variables"] = json.loads(row["variables"])
        row["said"] = {name: row["prompt"][start:end] for name, (start, end) in row["spans"].items()}
    return rows


def test_all_are_there() -> None:
    assert (
        {*hw.behavior.names()}
        >= {*NAMES}
        >= {
            *("agreement", "arithmetic", "capitals", "colors", "greater_than", "induction", "ioi", "successor"),
        }
    )
    for name in NAMES:
        summary = (generators.registry.get(name).__doc__ or "").split("\n")[0]
        assert len(summary) > 20, name


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_pair_is_well_formed(name: str, options: dict) -> None:
    behavior = hw.behavior(name, n=40, seed=2, **options)
    assert behavior.n == 40
    assert (behavior.train.n, behavior.test.n) == (20, 20)
    assert len(set(behavior.prompts)) == 40
    assert behavior.about["generator"] == name
    assert behavior.about["options"].items() >= options.items()
    assert behavior.about["licence"]
    for row in rows_of(behavior):
        assert row["answers"]
        assert row["foils"]
        assert not set(row["answers"]) & set(row["foils"])
        assert row["prompt"] != row["counterfactual"]
        assert row["prompt"] == row["prompt"].strip()
        assert "{" not in row["prompt"] + row["counterfactual"]
        assert row["template"]
        assert row["spans"]["END"][1] == len(row["prompt"])
        assert all(text.strip() and text == text.strip() for text in row["said"].values()), row["said"]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_the_same_seed_gives_the_same_and_another_seed_another(name: str, options: dict) -> None:
    first = hw.behavior(name, n=40, seed=5, **options)
    assert first.frame.equals(hw.behavior(name, n=40, seed=5, **options).frame)
    assert first.hash != hw.behavior(name, n=40, seed=6, **options).hash


def test_the_table_does_not_depend_on_the_process() -> None:
    code = (
        "import headwater as hw; names = hw.behavior.generators.BUILT_IN;"
        "print([hw.behavior(name, n=20, seed=1).hash for name in names])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert told == {f"{[hw.behavior(name, n=20, seed=1).hash for name in NAMES]}\n"}


def overlap(behavior: Behavior, *keys: str) -> set:
    sides = [
        {row["variables"][key] for row in rows_of(part) for key in keys} for part in (behavior.train, behavior.test)
    ]
    return sides[0] & sides[1]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ioi", ("IO", "S")),
        ("capitals", ("country",)),
        ("agreement", ("subject",)),
        ("greater_than", ("event",)),
        ("induction", ("word",)),
    ],
)
def test_train_and_test_share_nothing_that_matters(name: str, keys: tuple) -> None:
    assert overlap(hw.behavior(name, n=100), *keys) == set()


@pytest.mark.parametrize(("depth", "least"), [(4, 1), (5, 2), (2, 1)])
def test_parentheses_are_balanced_by_the_answer_and_by_nothing_else(depth: int, least: int) -> None:
    made = hw.behavior("parentheses", n=80, seed=3, depth=depth, least=least)
    depths = []
    for row in rows_of(made):
        *solved, line = row["prompt"].split("\n")
        assert all(text.count("(") == text.count(")") > 0 for text in solved)
        needed = line.count("(")
        depths.append(needed)
        assert row["answers"] == [")" * needed] and line.count(")") == 0
        assert sorted(row["foils"]) == sorted(")" * k for k in range(1, depth + 1) if k != needed)
        assert row["said"]["outer"] == row["said"]["inner"] == "("
        assert row["spans"]["outer"][0] == row["prompt"].rfind("\nprint(") + len("\nprint")
        assert row["spans"]["inner"][0] == row["prompt"].rfind("(")
        others = [(row["counterfactual"], row["foils"][0])]
        others += [(one["counterfactual"], one["foils"][0]) for one in json.loads(row["alternatives"])]
        for text, first in others:
            assert first == ")" * text.split("\n")[-1].count("(") != row["answers"][0]
            assert sum(a != b for a, b in zip(text, row["prompt"], strict=True)) == 1
    assert {d: depths.count(d) for d in set(depths)} == dict.fromkeys(
        range(least, depth + 1), pytest.approx(80 / (depth - least + 1), abs=2)
    )
    train, test = ({row["variables"]["thing"] for row in rows_of(part)} for part in (made.train, made.test))
    assert not train & test


@pytest.mark.parametrize("options", [{"depth": 9}, {"least": 4}, {"joint": "?"}, {"shots": -1}])
def test_parentheses_refuse_what_makes_no_line(options: dict) -> None:
    with pytest.raises(BehaviorError):
        hw.behavior("parentheses", n=4, **options)


@pytest.mark.parametrize("counterfactual", ["swap", "abc"])
def test_ioi(counterfactual: str) -> None:
    behavior = hw.behavior("ioi", n=200, counterfactual=counterfactual)
    rows = rows_of(behavior)
    assert {row["order"] for row in rows} == {"ABBA", "BABA"}
    assert len({row["template"] for row in rows}) >= 12
    for row in rows:
        io, s = row["variables"]["IO"], row["variables"]["S"]
        assert row["said"] == {"IO": io, "S1": s, "S2": s, "END": row["prompt"].split()[-1]}
        assert (row["answers"], row["foils"]) == ([f" {io}"], [f" {s}"])
        assert row["spans"]["S1"][0] < row["spans"]["S2"][0]
        assert (row["spans"]["IO"][0] < row["spans"]["S1"][0]) == (row["order"] == "ABBA")
        words = re.findall(r"\w+", row["prompt"])
        assert (words.count(io), words.count(s)) == (1, 2)
        then = re.findall(r"\w+", row["counterfactual"])
        if counterfactual == "swap":
            assert (then.count(io), then.count(s)) == (2, 1)
            # only S2 changed
            start, end = row["spans"]["S2"]
            assert row["counterfactual"] == row["prompt"][:start] + io + row["prompt"][end:]
        else:
            changed = [word for word, was in zip(then, words, strict=True) if word != was]
            assert len(set(changed)) == len(changed) == 3
            assert not {io, s} & set(then)


def test_ioi_train_names_never_appear_in_test_counterfactuals() -> None:
    behavior = hw.behavior("ioi", n=200, counterfactual="abc")
    train = {row["variables"][key] for row in rows_of(behavior.train) for key in ("IO", "S")}
    said = {word for text in behavior.test.counterfactuals for word in re.findall(r"\w+", text)}
    assert not train & said


def test_greater_than() -> None:
    for row in rows_of(hw.behavior("greater_than", n=60)):
        year = row["variables"]["year"]
        assert int(row["said"]["year"]) == year
        assert [int(text) for text in row["answers"]] == list(range(year + 1, 100))
        assert [int(text) for text in row["foils"]] == list(range(year + 1))
        assert "01 to the year" in row["counterfactual"]
    for row in rows_of(hw.behavior("greater_than", n=60, counterfactual="late")):
        (then,) = re.findall(r"year \d\d(\d\d) to", row["counterfactual"])
        assert int(then) > row["variables"]["year"]


def test_capitals_are_facts() -> None:
    known = facts()
    assert len(known) >= 140
    assert known["France"] == ("Paris", "Europe")
    assert known["Japan"][0] == "Tokyo"
    assert not any(capital in country for country, (capital, _region) in known.items())
    behavior = hw.behavior("capitals")
    assert behavior.n == len(known)
    for row in rows_of(behavior):
        country = row["said"]["country"]
        assert row["answers"] == [f" {known[country][0]}"]
        for other in [
            {"counterfactual": row["counterfactual"], "foils": row["foils"]},
            *json.loads(row["alternatives"]),
        ]:
            (asked,) = re.findall(r"capital of (.*) is$", other["counterfactual"])
            assert other["foils"] == [f" {known[asked][0]}"]
            assert asked != country
    more = hw.behavior("capitals", n=2 * len(known))
    assert len({row["template"] for row in rows_of(more)}) == 2
    with pytest.raises(BehaviorError, match="152 countries in 3 templates"):
        hw.behavior("capitals", n=10_000)


def test_capitals_with_examples() -> None:
    behavior = hw.behavior("capitals", n=20, shots=2)
    for row in rows_of(behavior):
        *examples, question = row["prompt"].split("\n")
        assert len(examples) == 2
        assert row["counterfactual"].startswith("\n".join(examples) + "\n")
        for example in examples:
            country, capital = re.fullmatch(r"The capital of (.*) is (.*)\.", example).groups()  # type: ignore[union-attr]
            assert facts()[country][0] == capital
            assert country not in question


@pytest.mark.parametrize("tokenizer", ["gpt2", "tiny"])
def test_capitals_keep_enough_pairs(tokenizer: str, request: pytest.FixtureRequest) -> None:
    bound = hw.behavior("capitals").bind(request.getfixturevalue(tokenizer))
    assert bound.n >= 120
    known = facts()
    for row in bound.frame.to_dicts():
        (asked,) = re.findall(r"capital of (.*) is$", row["counterfactual"])
        assert row["foils"] == [f" {known[asked][0]}"]


@pytest.mark.parametrize("choices", [2, 4])
def test_colors_as_multiple_choice(choices: int) -> None:
    rows = rows_of(hw.behavior("colors", n=96, format="choice", choices=choices))
    cells = [(row["labels"], row["place"]) for row in rows]
    assert {labels for labels, _place in cells} == set(LABELS)
    counts = {cell: cells.count(cell) for cell in cells}
    assert len(counts) == len(LABELS) * choices
    assert len(set(counts.values())) == 1

    def options(text: str) -> dict[str, str]:
        return dict(re.findall(r"^\((.)\) (\w+)$", text, flags=re.M))

    for row in rows:
        offered, then = options(row["prompt"]), options(row["counterfactual"])
        letters = LABELS[row["labels"]][:choices]
        assert "".join(offered) == letters
        (answer,) = row["answers"]
        assert offered[answer] == row["said"]["stated"] == row["said"]["option"]
        assert letters[int(row["place"]) - 1] == answer
        assert row["spans"]["stated"][1] < row["spans"]["option"][0]
        assert {answer, *row["foils"]} == set(letters)
        # under the counterfactual the stated color stands at one of the foils
        (where,) = [letter for letter, text in then.items() if text == offered[answer]]
        assert where in row["foils"]
        assert sorted(then.values()) == sorted(offered.values())
        assert row["prompt"].endswith("(")


@pytest.mark.parametrize("things", [1, 2])
def test_colors_as_cloze(things: int) -> None:
    for row in rows_of(hw.behavior("colors", n=48, format="cloze", things=things)):
        color = row["answers"][0].strip()
        assert row["said"]["stated"] == color == row["variables"]["color"]
        assert row["prompt"].count(row["said"]["asked"]) >= 2
        foil = row["foils"][0].strip()
        exchanged = row["prompt"].replace(color, "@").replace(foil, color).replace("@", foil)
        assert row["counterfactual"] == exchanged
        assert (foil in row["prompt"].split()[:-1] or f"{foil}." in row["prompt"] or f"{foil}," in row["prompt"]) == (
            things == 2
        )


def test_agreement() -> None:
    rows = rows_of(hw.behavior("agreement", n=100))
    assert {row["noun_agrees"] for row in rows} == {"none", "yes", "no"}
    assert {row["template"] for row in rows} == {"simple", "across"}
    for row in rows:
        plural = row["number"] == "plural"
        assert row["said"]["subject"] == row["variables"]["subject"] + "s" * plural
        verbs = {" is": " are", " has": " have", " does": " do", " was": " were"}
        pair = (row["foils"][0], row["answers"][0]) if plural else (row["answers"][0], row["foils"][0])
        assert verbs[pair[0]] == pair[1]
        start, end = row["spans"]["subject"]
        other = row["variables"]["subject"] + "s" * (not plural)
        assert row["counterfactual"] == row["prompt"][:start] + other + row["prompt"][end:]
        if row["template"] == "across":
            assert (row["said"]["noun"].endswith("s") == plural) == (row["noun_agrees"] == "yes")


def test_agreement_from_published_files(shared_data: Path) -> None:
    folder = shared_data / "sva"
    if not folder.is_dir():
        pytest.skip(f"no agreement pairs at {folder}")
    behavior = hw.behavior("agreement", n=60, folder=str(folder))
    assert (behavior.train.n, behavior.test.n) == (30, 30)
    published = {
        split: {
            json.loads(line)["clean_prefix"]
            for kind in ("simple", "nounpp")
            for line in (folder / f"{kind}_{split}.json").read_text().splitlines()
        }
        for split in ("train", "test")
    }
    for row in rows_of(behavior):
        assert row["prompt"] in published[row["split"]]
        assert row["said"]["subject"] == row["prompt"].split()[1]
    with pytest.raises(BehaviorError, match="fewer different pairs"):
        hw.behavior("agreement", n=100_000, folder=str(folder))


def test_agreement_files_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(BehaviorError, match="cannot read the agreement pairs"):
        hw.behavior("agreement", structure="simple", folder=str(tmp_path))
    (tmp_path / "simple_train.json").write_text('{"clean_prefix": "The dog"}\n')
    with pytest.raises(BehaviorError, match=r"simple_train.json, line 1: not a pair.*patch_prefix"):
        hw.behavior("agreement", structure="simple", folder=str(tmp_path))


@pytest.mark.parametrize("period", [4, 10, 40])
def test_induction(period: int) -> None:
    for row in rows_of(hw.behavior("induction", n=40, period=period)):
        for text, follows in ((row["prompt"], row["answers"]), (row["counterfactual"], row["foils"])):
            words = text.split()
            # the last word stood there once before, and what followed it then is the answer (of that prompt)
            assert words.count(words[-1]) == 2
            assert [f" {words[words.index(words[-1]) + 1]}"] == follows
            first, again = words[1 : period + 1], words[period + 1 :]
            assert again == first[: len(again)]
        assert sorted(row["prompt"].split()) == sorted(row["counterfactual"].split())
        assert row["said"]["first"] == row["said"]["END"]
        assert f" {row['said']['source']}" == row["answers"][0]
        assert row["prompt"].index(row["said"]["first"]) == row["spans"]["first"][0] or len(row["said"]["first"]) < 5


def test_successor() -> None:
    rows = rows_of(hw.behavior("successor"))
    assert {row["series"] for row in rows} == set(SERIES)
    for row in rows:
        items, _cyclic = SERIES[row["series"]]

        def after(text: str, items: list[str] = items) -> str:
            found = [word for word in re.findall(r"\w+", text) if word in items]
            return " " + items[(items.index(found[-1]) + 1) % len(items)]

        assert after(row["prompt"]) == row["answers"][0]
        assert after(row["counterfactual"]) == row["foils"][0]
        assert all(after(other["counterfactual"]) == other["foils"][0] for other in json.loads(row["alternatives"]))
        assert after(row["said"]["last"]) == row["answers"][0]
        assert len([word for word in re.findall(r"\w+", row["prompt"]) if word in items]) == int(row["run"])


@pytest.mark.parametrize(("digits", "operation"), [(1, "+"), (2, "+"), (2, "-"), (2, "both")])
def test_arithmetic(digits: int, operation: str) -> None:
    sides: dict[str, set] = {"train": set(), "test": set()}
    for row in rows_of(hw.behavior("arithmetic", n=40, digits=digits, operation=operation)):
        for text, results in ((row["prompt"], row["answers"]), (row["counterfactual"], row["foils"])):
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=", text.split("\n")[-1]).groups()  # type: ignore[union-attr]
            assert [str(int(a) + int(b) if sign == "+" else int(a) - int(b))] == results
            assert len(a) == len(b) == digits
            sides[row["split"]].add((sign, *sorted((a, b))))
        for line in row["prompt"].split("\n")[:-1]:
            a, sign, b, result = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line).groups()  # type: ignore[union-attr]
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert row["answers"][0][0] != row["foils"][0][0]
        assert (row["said"]["a"], row["said"]["b"]) == (str(row["variables"]["a"]), str(row["variables"]["b"]))
        assert row["said"]["END"] == "="
    assert not sides["train"] & sides["test"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("ioi", {"counterfactal": "swap"}, r"no such option.*'counterfactal'.*counterfactual"),
        ("ioi", {"counterfactual": "abd"}, r"'abd'.*'swap' or 'abc'"),
        ("ioi", {"templates": 0}, "templates"),
        ("capitals", {"shots": 9}, "from 0 to 8"),
        ("colors", {"format": "mcq"}, "'cloze' or 'choice' or 'both'"),
        ("colors", {"choices": 5}, "from 2 to 4"),
        ("induction", {"period": True}, "whole number"),
        ("ioi", {"n": 1}, "at least 2"),
        ("ioi", {"n": "ten"}, "n='ten'"),
        ("ioi", {"seed": "a"}, "seed is a whole number"),
        ("successor", {"n": 4000}, "cannot make so many.*at most"),
        ("arithmetic", {"n": 4000, "digits": 1, "shots": 0}, "cannot make so many.*at most about"),
    ],
)
def test_wrong_options(name: str, options: dict, says: str) -> None:
    with pytest.raises(BehaviorError, match=says):
        hw.behavior(name, **options)


def test_fill_gives_the_span_of_the_last_use() -> None:
    text, spans = fill("{a} and {b}, {a}.", {"a": "Ann", "b": ""})
    assert text == "Ann and , Ann."
    assert spans == {"a": (10, 13), "b": (8, 8)}
    with pytest.raises(KeyError):
        fill("{c}", {})


def test_a_generator_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators.registry, "_known", dict(generators.registry._known))

    @generators.generator("echo")
    def echo(n: int | None, rng: Any, *, word: str = "hi") -> Made:
        """Echo."""
        split = halves(range(10), rng)
        pairs = [
            Pair(prompt=f"{word} {i}", counterfactual=f"ho {i}", answers=[" a"], foils=[" b"], split=side)
            for side, numbers in split.items()
            for i in numbers
        ]
        return Made(pairs=pairs[:n])

    assert hw.behavior("echo", word="hey").prompts[0].startswith("hey ")
    assert "echo" in hw.behavior.names()
