"""`check` says line by line what is wrong with a file; `load` refuses what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import headwater as hw
from headwater.behavior import generators
from headwater.behavior.check import check
from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError

HEAD = "prompt,counterfactual,answer,foil\n"
GOOD = "The dog,The cat, is, are\n"


def found(path: Path, tokenizer: Any = None) -> list[tuple[int, str, str, str]]:
    table = check(path, tokenizer)
    assert table.columns == ["line", "column", "problem", "mend", "level"]
    assert all(table["mend"].to_list())
    return [row[:4] for row in table.rows()]


def write(tmp_path: Path, text: str, name: str = "mine.csv") -> Path:
    file = tmp_path / name
    file.write_bytes(text.encode())
    return file


def test_a_good_file_has_nothing_wrong(tmp_path: Path) -> None:
    file = write(tmp_path, HEAD + GOOD)
    assert found(file) == []
    behavior = Behavior.load(file)
    assert behavior.frame["answers"].to_list() == [[" is"]]
    assert behavior.frame["foils"].to_list() == [[" are"]]
    assert behavior.name == "mine"


@pytest.mark.parametrize("name", generators.BUILT_IN)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_generated_files_have_nothing_wrong(name: str, suffix: str, tmp_path: Path) -> None:
    assert found(hw.behavior(name, n=20).save(tmp_path / f"{name}.{suffix}")) == []


@pytest.mark.parametrize(
    ("text", "line", "column", "problem"),
    [
        ("", 0, "", "the file is empty"),
        ("\n \n", 0, "", "the file is empty"),
        (HEAD, 0, "", "a header and no pairs"),
        (HEAD + "\n" + GOOD + "The dog,,x,y\n", 4, "counterfactual", "the counterfactual is empty"),
        (HEAD + GOOD + " ,The cat, is, are\n", 3, "prompt", "the prompt is empty"),
        (HEAD + GOOD + "A dog,A cat,, are\n", 3, "answers", "no answer"),
        (HEAD + GOOD + "A dog,A cat, is, is\n", 3, "foils", "' is' is an answer too"),
        (HEAD + GOOD + "A dog,A dog, is, are\n", 3, "counterfactual", "it is the prompt itself"),
        (HEAD + GOOD + "A dog,A cat, is\n", 3, "", "3 cells where the header has 4"),
        (HEAD + GOOD + '"A dog,A cat, is, are\n', 3, "", "not CSV: unexpected end of data"),
        (
            HEAD + 'A "dog,A cat, is, are\n"Two\nlines",x y, is, are\nA dog,A dog, is, are\n',
            5,
            "counterfactual",
            "itself",
        ),
        (HEAD + GOOD + GOOD, 3, "prompt", "the same pair stands on line 2"),
        (
            HEAD + GOOD + "A dog,A cat,is, are\n",
            3,
            "answers",
            "'is' would follow the prompt without a space: 'A dogis'",
        ),
        (HEAD + GOOD + '"A dog ",A cat, is, are\n', 3, "prompt", "it ends with a space"),
        (HEAD + GOOD + "A \0dog,A cat, is, are\n", 3, "", "a NUL character"),
        ("prompt,counterfactual,answer,foil,split\n" + "A dog,A cat, is, are,dev\n", 2, "split", "unknown split 'dev'"),
        ("id,prompt,counterfactual,answer,foil\na," + GOOD + "a,A dog,A cat, is, are\n", 3, "id", "stands on line 2"),
        ("id,prompt,counterfactual,answer,foil\na," + GOOD + ",A dog,A cat, is, are\n", 3, "id", "has no id"),
        ("prompt,counterfactual,answers,answer\nA dog,A cat, is, is\n", 2, "answer", "both 'answer' and 'answers'"),
        ("prompt,prompt,counterfactual,answer\na,b,c,d\n", 1, "prompt", "stands there twice"),
        ('prompt,counterfactual,answers\nA dog,A cat,"[3]"\n', 2, "answers", "neither a text nor a list of texts"),
        ('prompt,counterfactual,answers\nA dog,A cat,"["" is"","" is""]"\n', 2, "answers", "the same answer twice"),
        ("prompt,counterfactual,answer,positions\nA dog,A cat, is,{\n", 2, "positions", "not JSON"),
        ("prompt,counterfactual,answer,positions\nA dog,A cat, is,3\n", 2, "positions", "not an object"),
        (
            'prompt,counterfactual,answer,positions\nA dog,A cat, is,"{""S"":[2,9]}"\n',
            2,
            "positions",
            "ends at 9, the prompt has 5",
        ),
        (
            'prompt,counterfactual,answer,positions\nA dog,A cat, is,"{""S"":[3,3]}"\n',
            2,
            "positions",
            "empty or runs backwards",
        ),
        (
            'prompt,counterfactual,answer,positions\nA dog,A cat, is,"{""S"":[3,true]}"\n',
            2,
            "positions",
            "not two whole numbers",
        ),
        ("prompt,counterfactual,answer,variables\nA dog,A cat, is,[1]\n", 2, "variables", "not an object"),
        ("prompt,counterfactual,answer,alternatives\nA dog,A cat, is,{}\n", 2, "alternatives", "not a list"),
    ],
)
def test_csv_problems(text: str, line: int, column: str, problem: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    rows = found(file)
    assert any(row[0] == line and row[1] == column and problem in row[2] for row in rows), rows
    # only what only warns may be loaded
    if set(check(file)["level"]) == {"warning"}:
        assert Behavior.load(file).n >= 1
    else:
        with pytest.raises(BehaviorError, match="does not hold minimal pairs") as caught:
            Behavior.load(file)
        assert "behavior check" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "missing", "mend"),
    [
        ("clean,corrupt,target", {"prompt", "counterfactual", "answers"}, "rename 'clean' to 'prompt'"),
        ("Prompt,counterfactual,answer", {"prompt"}, "rename 'Prompt' to 'prompt'"),
        ("promt,counterfactual,answer", {"prompt"}, "rename 'promt' to 'prompt'"),
        ("prompt,counterfactuals,answer", {"counterfactual"}, "rename 'counterfactuals'"),
        ("prompt,counterfactual,xyz", {"answers"}, "add a column 'answers'"),
    ],
)
def test_missing_columns_name_near_ones(header: str, missing: set, mend: str, tmp_path: Path) -> None:
    rows = found(write(tmp_path, header + "\nA dog,A cat, is\n"))
    assert {row[1] for row in rows} == missing
    assert all(row[2] == "the column is missing" for row in rows)
    assert any(mend in row[3] for row in rows)


def test_jsonl_problems(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "A dog", "counterfactual": "A cat", "answers": [" is"], "foils": [" are"]})
    lines = [good, "{", "", "[1]", '{"prompt": 3, "counterfactual": "b", "answer": "c"}', '{"prompt": "a b"}']
    rows = found(write(tmp_path, "\n".join(lines), "mine.jsonl"))
    assert [(line, column) for line, column, _p, _m in rows] == [
        (2, ""),
        (4, ""),
        (5, "prompt"),
        (6, "counterfactual"),
        (6, "answers"),
    ]
    assert "not JSON: Expecting property name" in rows[0][2]
    assert "a JSON list, not an object" in rows[1][2]
    assert "not a text: 3" in rows[2][2]
    assert found(write(tmp_path, "", "mine.jsonl")) == [
        (0, "", "the file is empty", rows and found(write(tmp_path, "", "e.csv"))[0][3])
    ]
    deep = "[" * 100_000
    assert "not JSON" in found(write(tmp_path, deep, "deep.jsonl"))[0][2]


def test_objects_and_spans_in_jsonl_are_read_as_they_are(tmp_path: Path) -> None:
    row = {
        "prompt": "A dog\u2028is",
        "counterfactual": "A cat",
        "answer": " is",
        "positions": {"S": [2, 5]},
        "variables": {"b": 1, "a": [2]},
    }
    behavior = Behavior.load(write(tmp_path, json.dumps(row, ensure_ascii=False) + "\n", "mine.jsonl"))
    assert behavior.frame["positions"].to_list() == ['{"S":[2,5]}']
    assert behavior.frame["variables"].to_list() == ['{"a":[2],"b":1}']
    assert behavior.prompts == ["A dog\u2028is"]


def test_files_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(HEAD.encode() + b"caf\xe9,x, is, are\n")
    with pytest.raises(BehaviorError, match=r"not UTF-8.*byte 37"):
        check(tmp_path / "latin.csv")
    (tmp_path / "mine.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(BehaviorError, match="not Parquet, or is cut short"):
        check(tmp_path / "mine.parquet")
    (tmp_path / "mine.xlsx").write_bytes(b"")
    with pytest.raises(BehaviorError, match=r"cannot tell the format.*\.csv"):
        check(tmp_path / "mine.xlsx")
    with pytest.raises(BehaviorError, match="no such file"):
        check(tmp_path / "none.csv")


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    assert found(write(tmp_path, "\ufeff" + HEAD + GOOD)) == []


def test_misaligned_pairs_given_a_tokenizer(tmp_path: Path, tiny: Any) -> None:
    rows = [
        "The dog,The big cat, is, are",
        "The dog,The cat, is, is it",
        "A dog,A dog, is, are",
        "The fox,The cat, is, are",
    ]
    file = write(tmp_path, HEAD + "\n".join(rows) + "\n")
    assert [row[:2] for row in found(file)] == [(4, "counterfactual")]
    with_tokenizer = found(file, tiny)
    assert [row[:2] for row in with_tokenizer] == [(2, "counterfactual"), (3, "foils"), (4, "counterfactual")]
    assert "lengths differ: 2 tokens in the prompt" in with_tokenizer[0][2]
    assert "begins differently" in with_tokenizer[1][3]
    # also where no pair at all aligns
    assert [row[0] for row in found(write(tmp_path, HEAD + "\n".join(rows[:2]) + "\n"), tiny)] == [2, 3]
    # and where whole columns are missing there is nothing to align
    assert {row[2] for row in found(write(tmp_path, "prompt\nA dog\n"), tiny)} == {"the column is missing"}


def test_scripts_without_spaces_are_not_warned_of(tmp_path: Path) -> None:
    assert found(write(tmp_path, HEAD + "法国的首都是,日本的首都是,巴黎,东京\n")) == []


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80), suffix=st.sampled_from(["csv", "jsonl"]))
@settings(max_examples=150, deadline=None)
def test_no_text_breaks_check(text: str, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("any") / f"any.{suffix}"
    file.write_bytes(text.encode())
    table = check(file)
    if not (table["level"] == "error").any():
        assert Behavior.load(file).n >= 1


@given(
    row=st.fixed_dictionaries(
        {"prompt": st.just("A dog"), "counterfactual": st.just("A cat"), "answer": st.just(" is")},
        optional={
            key: st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(max_size=3),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
                max_leaves=4,
            )
            for key in ("foils", "positions", "variables", "alternatives", "split", "id", "template", "extra")
        },
    )
)
@settings(max_examples=200, deadline=None)
def test_no_json_value_breaks_check_or_load(row: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("any") / "any.jsonl"
    file.write_text(json.dumps(row))
    wrong = (check(file)["level"] == "error").any()
    try:
        assert Behavior.load(file).n == 1
    except BehaviorError:
        assert wrong
    else:
        assert not wrong
