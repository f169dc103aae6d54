"""Behavior: a value with a content hash that survives every file format."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headwater as hw
from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError

PAIR = {"prompt": "A b", "counterfactual": "C b", "answer": " x", "foil": " y"}

# Any text a file could hold; surrogates are not text, and NUL is not text in CSV.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
solid = texts.filter(lambda text: text.strip() != "")


@st.composite
def behaviors(draw: st.DrawFn) -> Behavior:
    n = draw(st.integers(1, 4))
    rows: list[dict[str, Any]] = []
    for index in range(n):
        prompt = f"{index} " + draw(solid)
        row: dict[str, Any] = {
            "id": f"r{index}",
            "prompt": prompt,
            "counterfactual": f"other {index}",
            "answers": ["+" + text for text in draw(st.lists(solid, min_size=1, max_size=3, unique=True))],
            "foils": ["-" + text for text in draw(st.lists(solid, max_size=3, unique=True))],
            "positions": draw(st.dictionaries(solid, st.just([0, len(prompt)]), max_size=2)),
            "variables": draw(st.dictionaries(solid, st.one_of(texts, st.integers(), st.booleans()), max_size=2)),
            "split": draw(st.sampled_from(["train", "test"])),
            "slice": draw(texts),
        }
        if draw(st.booleans()):
            row["alternatives"] = [{"counterfactual": draw(solid), "foils": [draw(solid)]}]
        rows.append(row)
    return Behavior.from_rows(rows, name="mine")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "ndjson", "parquet"])
@given(behavior=behaviors())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, suffix: str, behavior: Behavior) -> None:
    file = behavior.save(tmp_path / f"mine.{suffix}")
    again = Behavior.load(file)
    assert again.frame.equals(behavior.frame)
    assert again.hash == behavior.hash
    assert again == behavior


def test_parquet_keeps_what_text_formats_cannot(tmp_path: Path) -> None:
    behavior = Behavior.from_rows([PAIR], name="n", metric="prob_diff", about={"seed": 3})
    again = Behavior.load(behavior.save(tmp_path / "other.parquet"))
    assert (again.name, again.metric, again.about["seed"]) == ("n", "prob_diff", 3)
    plain = Behavior.load(behavior.save(tmp_path / "other.csv"))
    assert (plain.name, plain.metric, plain.hash) == ("other", "logit_diff", again.hash)


def test_hash_is_of_the_content() -> None:
    base = Behavior.from_rows([PAIR])
    assert len(base.hash) == 64
    assert Behavior.from_rows([dict(reversed(PAIR.items()))], name="z").hash == base.hash
    changes = [
        {"answer": " z"},
        {"foil": " q"},
        {"split": "test"},
        {"id": "k"},
        {"variables": {"a": 1}},
        {"extra": "1"},
    ]
    assert len({base.hash, *(Behavior.from_rows([{**PAIR, "split": "train", **c}]).hash for c in changes)}) == 7


def test_what_is_missing_is_filled_in() -> None:
    rows = [{**PAIR, "prompt": f"A {i}"} for i in range(10)]
    behavior = Behavior.from_rows(rows)
    assert behavior.frame.columns == [
        *("id", "prompt", "counterfactual", "answers", "foils", "positions", "variables", "template", "split"),
    ]
    assert behavior.frame["id"].n_unique() == 10
    assert (behavior.train.n, behavior.test.n) == (5, 5)
    # by prompt, not by place: another order of the rows changes no split, and a repeated prompt stays on one side
    shuffled = Behavior.from_rows([*rows[::-1], *rows])
    side = dict(zip(behavior.prompts, behavior.frame["split"], strict=True))
    assert all(side[p] == s for p, s in zip(shuffled.prompts, shuffled.frame["split"], strict=True))


def test_indexing_and_sampling() -> None:
    behavior = hw.behavior("ioi", n=20)
    assert behavior[:8].n == len(behavior[:8]) == 8
    assert behavior[-1].prompts == behavior.prompts[-1:]
    assert behavior[[3, 1]].prompts == [behavior.prompts[3], behavior.prompts[1]]
    assert behavior[:8].name == "ioi"
    with pytest.raises(IndexError):
        behavior[20]
    with pytest.raises(BehaviorError, match="no pairs are left"):
        behavior[5:5]
    some = behavior.sample(10, seed=1)
    assert (some.train.n, some.test.n) == (5, 5)
    assert some == behavior.sample(10, seed=1) != behavior.sample(10, seed=2)
    assert behavior.sample(50) is behavior
    lopsided = Behavior.from_rows([{**PAIR, "split": "train" if i else "test"} for i in range(9)])
    assert (lopsided.sample(6).train.n, lopsided.sample(6).test.n) == (5, 1)
    with pytest.raises(BehaviorError, match="so few"):
        behavior.sample(0)
    with pytest.raises(BehaviorError, match="no pairs in that split"):
        behavior.train.split("test")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"split": "dev"}, "unknown split.*dev.*train or test"),
        ({"answer": 3}, "answers are not texts"),
        ({"positions": "{"}, "positions is not JSON"),
    ],
)
def test_bad_rows(change: dict, says: str) -> None:
    with pytest.raises(BehaviorError, match=says):
        Behavior.from_rows([{**PAIR, **change}])


def test_bad_tables() -> None:
    with pytest.raises(BehaviorError, match="no rows"):
        Behavior.from_rows([])
    with pytest.raises(BehaviorError, match=r"lacks columns.*Wanted: counterfactual"):
        Behavior(pl.DataFrame({"prompt": ["a"], "answers": [["b"]]}))
    with pytest.raises(BehaviorError, match="stand there twice"):
        Behavior.from_rows([{**PAIR, "id": "a"}, {**PAIR, "id": "a"}])
    with pytest.raises(BehaviorError, match="wrong type"):
        Behavior(pl.DataFrame({"prompt": ["a"], "counterfactual": ["c"], "answers": [{"b": 1}]}))


def test_slices_are_what_varies() -> None:
    rows = [{**PAIR, "prompt": f"A {i}", "template": "t", "kind": str(i % 2), "same": "x"} for i in range(4)]
    assert Behavior.from_rows(rows).slices == ["kind"]
    assert hw.behavior("ioi", n=40).slices == ["template", "order"]


def test_saving_where_one_may_not(tmp_path: Path) -> None:
    behavior = Behavior.from_rows([PAIR])
    (tmp_path / "file").write_text("")
    with pytest.raises(BehaviorError, match="cannot write"):
        behavior.save(tmp_path / "file" / "x.csv")
    with pytest.raises(BehaviorError, match="cannot tell the format"):
        behavior.save(tmp_path / "x.xlsx")


def test_package_is_callable_and_light() -> None:
    code = (
        "import sys, headwater.behavior as b, headwater as hw; assert hw.behavior is b and callable(b);"
        "assert not {'torch', 'transformers', 'polars', 'scipy', 'numpy'} & set(sys.modules), 'heavy';"
        "b.names(); assert 'polars' not in sys.modules;"
        "x = hw.behavior('ioi', n=4); assert 'transformers' not in sys.modules; assert x.n == 4;"
        "assert b.evaluate.evaluate and callable(b.evaluate) and callable(b.check) and callable(b.bind)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(BehaviorError, match=r"unknown behavior.*'greaterthan'.*greater_than"):
        hw.behavior("greaterthan")
    with pytest.raises(BehaviorError, match=r"no such file.*Near it lies mine.csv"):
        Behavior.from_rows([PAIR]).save(tmp_path / "mine.csv")
        hw.behavior(tmp_path / "mime.csv")
    assert hw.behavior(str(tmp_path / "mine.csv")) == hw.behavior.load(tmp_path / "mine.csv")  # type: ignore[operator]
    with pytest.raises(BehaviorError, match="takes no options"):
        hw.behavior(tmp_path / "mine.csv", shots=2)  # type: ignore[operator]
    with pytest.raises(BehaviorError, match="this is a folder"):
        (tmp_path / "folder.csv").mkdir()
        hw.behavior(tmp_path / "folder.csv")  # type: ignore[operator]


def test_repr_escapes_what_a_file_says() -> None:
    behavior = Behavior.from_rows([{**PAIR, "prompt": "<script>alert(1)</script>"}])
    assert "<script>" not in behavior._repr_html_()
    assert "n=1" in repr(behavior)
