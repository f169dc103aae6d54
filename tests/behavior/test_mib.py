"""MIB's tasks: its own row format read as the track scores it, and pairs made from its lists."""

import json
from typing import Any

import polars as pl
import pytest

import headwater as hw
from headwater.behavior.generators.mib import ARITHMETIC, IOI, MCQA
from headwater.behavior.mib import TASKS, read_mib, track_pairs
from headwater.core.errors import BehaviorError

CHOICES = {"label": ["A", "B"], "text": ["red", "blue"]}
ROWS: dict[str, dict[str, Any]] = {
    "ioi": {
        "template": "t", "prompt": "When Mary and John went, John gave it to", "choices": ["Mary", "John"],
        "answerKey": 0,
        "metadata": {"indirect_object": "Mary", "subject": "John", "random_c": "Paul"},
        "s2_io_flip_counterfactual": {"prompt": "When Mary and John went, Mary gave it to", "answerKey": 1},
        "abc_counterfactual": {"prompt": "When Paul and Mark went, Laura gave it to", "choices": [], "answerKey": 1},
    },
    "mcqa": {
        "prompt": "Question: A box is red.\nA. red\nB. blue\nAnswer:", "choices": CHOICES, "answerKey": 0,
        "symbol_counterfactual": {
            "prompt": "Question: A box is red.\n1. red\n2. blue\nAnswer:", "answerKey": 0,
            "choices": {"label": [1, 2], "text": ["red", "blue"]},
        },
    },
    "arithmetic_addition": {
        "prompt": "The sum of 12 and 30 is", "label": "42", "operator": "+", "operand1": 12, "operand2": 30,
        "random_counterfactual": {"prompt": "The sum of 50 and 31 is", "label": 81},
    },
    "arc_easy": {
        "prompt": "Question: Which?\nA. red\nB. blue\nAnswer:", "choices": CHOICES, "answerKey": 1, "arc_id": "x",
        "symbol_counterfactual": {
            "prompt": "Question: Which?\n1. red\n2. blue\nAnswer:", "answerKey": 1,
            "choices": {"label": ["1", "2"], "text": ["red", "blue"]},
        },
    },
}  # fmt: skip
EXPECTED = {"ioi": (" Mary", " John"), "mcqa": ("A", "1"), "arithmetic_addition": ("42", "81"), "arc_easy": ("B", "2")}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("task", EXPECTED)
def test_rows_are_read_as_the_track_scores_them(task: str, suffix: str, tmp_path) -> None:
    for split in ("train", "validation", "test"):
        row = ROWS[task] | {"prompt": f"{split} {ROWS[task]['prompt']}"}
        path = tmp_path / f"{task}_{split}.{suffix}"
        if suffix == "parquet":
            pl.DataFrame([row]).write_parquet(path)
        else:
            path.write_text(json.dumps([row]) if suffix == "json" else json.dumps(row) + "\n\n")
    made = read_mib(task, tmp_path)
    assert made.frame["split"].to_list() == ["train", "train", "test"]
    row = made.frame.to_dicts()[-1]
    assert row["prompt"] == f"test {ROWS[task]['prompt']}"
    assert row["counterfactual"] == ROWS[task][TASKS[task]]["prompt"]
    assert (row["answers"], row["foils"]) == ([EXPECTED[task][0]], [EXPECTED[task][1]])
    assert made.about["task"] == task and made.name == f"mib_{task}"
    assert read_mib(task, {"test": tmp_path / f"{task}_test.{suffix}"}).n == 1


def test_another_counterfactual_is_asked_for_by_name(tmp_path) -> None:
    (tmp_path / "ioi.jsonl").write_text(json.dumps(ROWS["ioi"]))
    made = read_mib("ioi", tmp_path / "ioi.jsonl", counterfactual="abc")
    assert made.counterfactuals == [ROWS["ioi"]["abc_counterfactual"]["prompt"]]
    with pytest.raises(BehaviorError, match="abc_counterfactual"):
        read_mib("ioi", tmp_path / "ioi.jsonl", counterfactual="s1_io_flip")


def test_rows_that_are_no_pairs_of_the_task_are_left_out(tmp_path) -> None:
    good = ROWS["arithmetic_addition"]
    rows = [
        good,
        good | {"operator": "-"},
        good | {"random_counterfactual": None},
        good | {"random_counterfactual": {"prompt": None}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_mib("arithmetic_addition", tmp_path / "a.jsonl").n == 1
    with pytest.raises(BehaviorError, match="no row"):
        (tmp_path / "b.jsonl").write_text(json.dumps(rows[1]))
        read_mib("arithmetic_addition", tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("nosuch", "{}", "unknown task"),
        ("ioi", None, "nothing is fetched"),
        ("ioi", "{", "cannot read"),
        ("ioi", '{"prompt": "x"}', "not a row of MIB"),
        ("ioi", "[1, 2]", "no rows"),
        ("mcqa", json.dumps(ROWS["mcqa"] | {"answerKey": 7}), "not a row of MIB"),
    ],
)
def test_what_is_not_there_or_not_mib_is_refused_by_name(task, content, says, tmp_path) -> None:
    path = tmp_path / "f.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BehaviorError, match=says):
        read_mib(task, path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BehaviorError):
        read_mib(task, tmp_path / "empty")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(BehaviorError):
        read_mib(task, tmp_path / "bad.parquet")


def test_the_tracks_own_filter(tiny: Any, tmp_path) -> None:
    rows = [ROWS["arithmetic_addition"], ROWS["arithmetic_addition"] | {
        "label": "4", "random_counterfactual": {"prompt": "The sum of 1 and 4 is", "label": 5}}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = track_pairs(read_mib("arithmetic_addition", tmp_path / "a.jsonl"), tiny)
    # digits are tokens of their own here, so 42 and 81 are two tokens each
    assert kept.frame["answers"].to_list() == [["4"]]
    third = {"indirect_object": "Mary", "subject": "John", "random_c": "Bartholomew"}
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, [ROWS["ioi"], ROWS["ioi"] | {"metadata": third}])))
    assert track_pairs(read_mib("ioi", tmp_path / "i.jsonl"), tiny).n == 1


# --- from MIB's lists


@pytest.fixture
def lists(shared_data) -> str:
    folder = shared_data / "mib"
    if not folder.is_dir():
        pytest.skip(f"no lists of MIB at {folder}")
    return str(folder)


@pytest.mark.parametrize("counterfactual", IOI)
def test_ioi_from_the_lists(counterfactual: str, lists: str, gpt2: Any) -> None:
    made = hw.behavior("mib_ioi", n=60, seed=1, data=lists, counterfactual=counterfactual)
    for row in made.frame.to_dicts():
        variables, spans = json.loads(row["variables"]), json.loads(row["positions"])
        said = {name: row["prompt"][a:b] for name, (a, b) in spans.items()}
        io, subject = variables["IO"], variables["S"]
        assert (said["IO"], said["S1"], said["S2"]) == (io, subject, subject)
        assert (row["answers"], row["foils"]) == ([f" {io}"], [f" {subject}"])
        cf = row["counterfactual"]
        names = io, subject, variables["random_a"], variables["random_b"], variables["random_c"]
        counts = tuple(cf.count(name) for name in names)
        expected = {
            "s2_io_flip": (2, 1, 0, 0, 0), "s1_io_flip": (1, 2, 0, 0, 0), "s1_ioi_flip_s2_ioi_flip": (2, 1, 0, 0, 0),
            "abc": (0, 0, 1, 1, 1), "random_names": (0, 0, 1, 2, 0), "random_names_s1_ioi_flip": (0, 0, 1, 2, 0),
            "random_names_s2_ioi_flip": (0, 0, 2, 1, 0), "random_names_s1_ioi_flip_s2_ioi_flip": (0, 0, 2, 1, 0),
        }[counterfactual]  # fmt: skip
        if not any(a != b and a in b for a in names for b in names):
            assert counts == expected
            order = (cf.find(names[0]) < cf.find(names[1])) == (row["order"] == "ABBA")
            if counterfactual in ("s2_io_flip", "s1_io_flip", "s1_ioi_flip_s2_ioi_flip"):
                assert order == ("s1" not in counterfactual)
        assert " an " not in row["prompt"] or row["prompt"].split(" an ")[1][0] in "aeiou"
    assert made.bind(gpt2).n >= 30
    assert track_pairs(made, gpt2).n >= 30
    train, test = ({json.loads(v)["IO"] for v in part.frame["variables"]} for part in (made.train, made.test))
    assert not train & test


@pytest.mark.parametrize("counterfactual", MCQA)
def test_multiple_choice_from_the_lists(counterfactual: str, lists: str, gpt2: Any) -> None:
    made = hw.behavior("mib_mcqa", n=40, seed=1, data=lists, counterfactual=counterfactual)
    for row in made.frame.to_dicts():
        for text, right in ((row["prompt"], row["answers"][0]), (row["counterfactual"], row["foils"][0])):
            question, *options, asks = text.split("\n")
            color = question.split(" is ")[1].split(".")[0]
            assert [line for line in options if line.endswith(f". {color}")] == [f"{right}. {color}"]
            assert asks == "Answer:" and len(options) == 4 and len({line.split(". ")[1] for line in options}) == 4
        labels = [line[0] for line in row["counterfactual"].split("\n")[1:5]]
        assert (labels == list("1234")) == (counterfactual == "symbol")
        assert (labels == list("ABCD")) == (counterfactual == "answerPosition")
    assert made.bind(gpt2).n == 40


@pytest.mark.parametrize("operation", ["+", "-"])
@pytest.mark.parametrize("counterfactual", ARITHMETIC)
def test_arithmetic_in_mibs_form(counterfactual: str, operation: str, gpt2: Any) -> None:
    made = hw.behavior("mib_arithmetic", n=36, seed=1, counterfactual=counterfactual, operation=operation)
    import re

    assert len(set(made.frame["template"])) == 6
    for row in made.frame.to_dicts():
        (a, b), (c, d) = (list(map(int, re.findall(r"\d+", row[key]))) for key in ("prompt", "counterfactual"))
        solve = (lambda x, y: x + y) if operation == "+" else (lambda x, y: x - y)
        assert (row["answers"], row["foils"]) == ([str(solve(a, b))], [str(solve(c, d))])
        assert solve(a, b) != solve(c, d)
        digits = [x != y for x, y in zip(f"{a:02d}{b:02d}", f"{c:02d}{d:02d}", strict=True)]
        changed = {"ones_op1": [1], "ones_op2": [3], "tens_op1": [0], "tens_op2": [2]}.get(counterfactual)
        if changed is not None:
            assert [i for i, yes in enumerate(digits) if yes] == changed
        if counterfactual == "ones_carry":
            carry = (lambda x, y: x % 10 + y % 10 > 9) if operation == "+" else (lambda x, y: x % 10 < y % 10)
            assert carry(a, b) != carry(c, d) and not digits[0] and not digits[2]
    if operation == "+":
        assert track_pairs(made, gpt2).n >= 18


def test_lists_that_are_not_there_are_asked_for(tmp_path) -> None:
    for name in ("mib_ioi", "mib_mcqa"):
        with pytest.raises(BehaviorError, match="data=FOLDER"):
            hw.behavior(name, n=4)
        with pytest.raises(BehaviorError, match="cannot read"):
            hw.behavior(name, n=4, data=str(tmp_path))
    (tmp_path / "mcqa_object_color_pairs.json").write_text('["a", "b"]')
    with pytest.raises(BehaviorError, match="no objects"):
        hw.behavior("mib_mcqa", n=4, data=str(tmp_path))
    with pytest.raises(BehaviorError, match="no tens"):
        hw.behavior("mib_arithmetic", n=4, digits=1, counterfactual="tens_op1")


def test_a_task_by_name_is_read_where_it_can_be_and_else_made(tmp_path, lists: str) -> None:
    from headwater.behavior.mib import mib_task

    assert mib_task("arithmetic_subtraction", n=4).about["options"]["operation"] == "-"
    assert mib_task("ioi", data=lists, n=4).name == "mib_ioi" and mib_task("mcqa", data=lists, n=4).n == 4
    (tmp_path / "arc_easy_test.json").write_text(json.dumps([ROWS["arc_easy"]]))
    assert mib_task("arc_easy", data=tmp_path).frame["answers"].to_list() == [["B"]]
    with pytest.raises(BehaviorError, match="'arc_challenge' is questions of others"):
        mib_task("arc_challenge", data=tmp_path)
    with pytest.raises(BehaviorError, match="unknown task"):
        mib_task("arc")
