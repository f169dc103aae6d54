"""truth list and compile."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import headwater as hw
from headwater.cli import app


def cli(*arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done


def test_list_names_every_program() -> None:
    from headwater.bench import truth

    rows = json.loads(cli("truth", "list", "--json").stdout)
    assert [row["name"] for row in rows] == truth.names()
    assert "How often the token" in cli("truth", "list").stdout


def test_compile_writes_model_mechanism_and_pairs(tmp_path: Path) -> None:
    out = tmp_path / "histogram"
    done = cli("truth", "compile", "histogram", "--out", str(out), "--n", "8")
    assert "a0.h0<q>" in done.stdout and "pairs.parquet" in done.stdout
    model, pairs = hw.load(out), hw.behavior(str(out / "pairs.parquet"))
    assert pairs.bind(model).n == 8
    assert hw.load_result(out / "mechanism").kind == "mechanism"


def test_compile_says_when_there_are_no_pairs(tmp_path: Path) -> None:
    done = cli("truth", "compile", "length", "--out", str(tmp_path / "length"), "--json")
    facts = json.loads(done.stdout)
    assert facts["pairs"] is None and facts["edges_of_the_circuit"] == 0
    assert (tmp_path / "length" / "config.json").exists()
    assert "depends on the length only" in cli("truth", "compile", "length", "--out", str(tmp_path / "again")).stdout


def test_an_unknown_program_is_a_mistake_not_a_traceback(tmp_path: Path) -> None:
    done = cli("truth", "compile", "histgram", "--out", str(tmp_path / "x"), code=2)
    assert "histogram" in done.stderr
    done = cli("truth", "compile", "histogram", "--out", str(tmp_path / "y"), "--max-length", "2", code=2)
    assert "at least 7" in done.stderr
