"""bench programs, mips and published: from the command line to files that load, and refusals in one paragraph."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headwater.cli import app
from headwater.core.results import load_result


def cli(*arguments: str | Path, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == code, done.output
    return done


def refused(*arguments: str | Path, says: str) -> None:
    text = cli(*arguments, code=2).stderr.strip()
    assert text.startswith("error: ") and len(text.splitlines()) == 1, text
    assert says in text, text


def test_programs_writes_the_source_and_the_result(tmp_path: Path) -> None:
    settings = [f"--set={one}" for one in ("length=4", "vocabulary=4", "steps=150", "batch=64", "train=150", "seeds=1")]
    said = cli("bench", "programs", "reverse", "--out", tmp_path / "made", *settings).stdout
    source = (tmp_path / "made" / "program.py").read_text()
    assert "def program(xs):" in said and source in said
    result = load_result(tmp_path / "made" / "result", check=True)
    assert result.program(list("0123")) == list("3210")  # type: ignore[attr-defined]
    refused("bench", "programs", "revers", says="reverse")
    refused("bench", "programs", "reverse", "--set", "steps", says="NAME=VALUE")


def test_mips_writes_programs_and_goes_on(tmp_path: Path) -> None:
    words = ("bench", "mips", "bitwise_not", "parity_all", "--out", tmp_path / "made")
    said = cli(*words).stdout
    assert "2 of 2 tasks solved" in said
    assert {path.name for path in (tmp_path / "made" / "tasks").iterdir()} == {
        "config.json", "bitwise_not.json", "parity_all.json",
    }  # fmt: skip
    assert "def program(xs):" in (tmp_path / "made" / "parity_all.py").read_text()
    rows = json.loads(cli(*words, "--json").stdout)["rows"]
    assert [row["solved"] for row in rows] == [True, True]
    refused(*words, "--set", "seeds=1", says="another config")
    refused("bench", "mips", "parity", says="parity_all")


def test_published_asks_for_what_it_needs(tmp_path: Path) -> None:
    refused("bench", "published", "ravle", says="ravel")
    refused("bench", "published", "interpbench", says="--data")
    refused("bench", "published", "ravel", says="--model")
    refused("bench", "published", "interpbench", "--data", tmp_path / "no", says="downloads no data")
    refused("bench", "published", "find", "--data", tmp_path, says="--proposals")


def test_find_from_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "strings"
    folder.mkdir()
    tests = [{"name": "f00000", "test_vec": [[["a", "b", "c"], ["aX", "q", "q"]]] * 4, "correct_inx": [1] * 4}]
    (folder / "unit_test_data.json").write_text(json.dumps(tests))
    (tmp_path / "mine.json").write_text(json.dumps({"f00000": "def f(s):\n    return s + 'X'"}))
    words = ("bench", "published", "find", "--data", folder, "--proposals", tmp_path / "mine.json")
    refused(*words, says="allow_code")
    found = json.loads(cli(*words, "--allow-code", "--json", "--out", tmp_path / "made").stdout)
    assert [row["value"] for row in found["rows"] if row["method"] == "proposal"] == [1.0, 1.0]
    assert load_result(tmp_path / "made" / "result").facts["benchmark"] == "FIND"


@pytest.mark.parametrize(
    ("words", "benchmark"),
    [
        (
            ("mib", "--task", "swap", "--data", "rows.json", "--set", "only_known=false", "--set", "rank=1"),
            "MIB causal variables",
        ),
        (("causalgym", "--data", "pairs.json", "--set", "n_train=8", "--site", "resid_post.2"), "CausalGym"),
    ],
)
def test_models_are_scored(
    words: tuple[str, ...], benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Any
) -> None:
    nouns = ("boy", "girl", "car", "cat", "dog", "bike", "chair", "desk", "doctor", "farmer")
    rows = [
        {"base": [f"The {a}"], "src": [f"The {a}s"], "base_label": " is", "src_label": " has", "base_type": "one",
         "src_type": "many"} for a in nouns
    ]  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    asked = [{"prompt": f"The {a}", "choices": ["is", "has"], "answerKey": i % 2} for i, a in enumerate(nouns)]
    swaps = [{**one, "swap_counterfactual": other} for one, other in zip(asked, [*asked[1:], asked[0]], strict=True)]
    (tmp_path / "rows.json").write_text(json.dumps(swaps))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("headwater.core.loading.load", lambda name: tiny_model)
    found = json.loads(cli("bench", "published", *words, "--model", "tiny", "--n", "8", "--json").stdout)
    assert found["facts"]["benchmark"] == benchmark
    assert {"full", "random"} <= {row["method"] for row in found["rows"]}
    assert all(row["lo"] <= row["value"] <= row["hi"] for row in found["rows"])
    refused(
        "bench", "published", "mib", "--task", "ioi", "--model", "tiny", "--data", "nothing", says="ioi_templates.json"
    )
