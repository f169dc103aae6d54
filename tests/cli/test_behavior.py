"""headwater behavior list|show|check and evaluate."""

import json
from pathlib import Path

from typer.testing import CliRunner

from headwater.cli import app

run = CliRunner().invoke

PAIRS = "prompt,counterfactual,answer,foil\n" + "".join(
    f"The {noun}s near the {other},The {noun} near the {other}, are, is\n"
    for noun, other in [("boy", "dog"), ("girl", "cat"), ("teacher", "key"), ("uncle", "box")]
)


def test_list() -> None:
    done = run(app, ["behavior", "list"])
    assert done.exit_code == 0
    rows = json.loads(run(app, ["behavior", "list", "--json"]).stdout)
    assert {"ioi", "colors", "agreement"} <= {row["name"] for row in rows}
    assert all(row["what"] and row["name"] in done.stdout for row in rows)


def test_show() -> None:
    rows = json.loads(run(app, ["behavior", "show", "ioi", "--n", "3", "--seed", "1", "--json"]).stdout)
    assert len(rows) == 3
    done = run(app, ["behavior", "show", "ioi", "--n", "3", "--seed", "1"])
    assert all(repr(row["prompt"]) in done.stdout for row in rows)


def test_check_a_good_file(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(PAIRS)
    done = run(app, ["behavior", "check", str(file), "--model", str(tiny_folder)])
    assert (done.exit_code, done.stdout.replace("\n", "")) == (0, f"{file}: nothing wrong.")


def test_check_names_line_column_and_mend(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(PAIRS + "The man,The man, is, are\nThe man,,is,are\n")
    done = run(app, ["behavior", "check", str(file), "--json"])
    assert done.exit_code == 2
    errors = [row for row in json.loads(done.stdout)["problems"] if row["level"] == "error"]
    assert [(row["line"], row["column"]) for row in errors] == [(6, "counterfactual"), (7, "counterfactual")]
    assert all(row["mend"] for row in errors)
    assert "2 errors" in done.stderr
    shown = run(app, ["behavior", "check", str(file)])
    assert shown.exit_code == 2
    assert "it is the prompt itself" in shown.stdout


def test_check_against_a_tokenizer(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(PAIRS + "The man who saw the boy,The man, is, are\n")
    assert run(app, ["behavior", "check", str(file)]).exit_code == 0
    done = run(app, ["behavior", "check", str(file), "--model", str(tiny_folder)])
    assert done.exit_code == 2
    assert "lengths differ" in done.stdout


def test_evaluate(tmp_path: Path, tiny_folder: Path) -> None:
    options = ["evaluate", "ioi", "--model", str(tiny_folder), "--n", "12"]
    found = json.loads(run(app, [*options, "--json"]).stdout)
    whole = {row["metric"]: row for row in found["metrics"] if row["slice"] == "all"}
    assert {"logit_diff", "accuracy"} <= set(whole)
    assert whole["logit_diff"]["lo"] <= whole["logit_diff"]["value"] <= whole["logit_diff"]["hi"]

    saved = tmp_path / "result"
    done = run(app, [*options, "--out", str(saved)])
    assert done.exit_code == 0, done.stderr
    assert f"{whole['logit_diff']['value']:.4g}" in done.stdout
    import headwater as hw

    kept = hw.load_result(saved, check=True)
    assert kept.tables["metrics"].filter(slice="all", metric="logit_diff")["value"][0] == whole["logit_diff"]["value"]


def test_evaluate_shows_the_canary(tiny_folder: Path) -> None:
    done = run(app, ["evaluate", "colors", "--model", str(tiny_folder), "--n", "12"])
    assert done.exit_code == 0, done.stderr
    assert "Canary" in done.stdout and "multiple choice" in done.stdout
