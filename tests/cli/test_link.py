"""headwater link and headwater lre, as they are typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headwater.cli import app

CONFIG = """
name: small
model: {type: llama, n_layers: 2, n_heads: 2, d_model: 16, d_mlp: 16, options: {initializer_range: 1.0}}
data: [{source: world, options: {relations: [capital, largest_city, state_code], length: 24}}]
steps: 12
batch: 8
threads: 1
checkpoints: {log: false, at: [6]}
"""
SMALL = ["--set", "examples=4", "--set", "validation=6", "--set", "n_test=8", "--set", "ranks=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("link")
    (folder / "c.yaml").write_text(CONFIG)
    twin = "data=[{source: world, options: {relations: [capital, largest_city, state_code], length: 24, permute: 1}}]"
    for name, more in (("a", []), ("b", ["--set", twin])):
        done = CliRunner().invoke(app, ["train", str(folder / "c.yaml"), "--out", str(folder / name), *more])
        assert done.exit_code == 0, done.output
    return folder


def test_a_run_is_linked_and_held_against_its_twin(runs: Path) -> None:
    done = CliRunner().invoke(app, ["link", str(runs / "a"), "--out", str(runs / "la"), *SMALL])
    assert done.exit_code == 0, done.output
    assert "Causality against" in done.output and "largest_city" in done.output
    assert "3 relations at 3 checkpoints" in done.output
    command = ["link", str(runs / "b"), "--out", str(runs / "lb"), "--against", str(runs / "la"), *SMALL, "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {row["level"] for row in told["worlds"]} == {"relation", "fact"}
    assert (runs / "lb" / "worlds" / "result.json").exists()
    assert [row["status"] for row in told["claims"]] == ["inconclusive"]  # three relations are too few to decide


def test_mistakes_of_link_leave_with_2(runs: Path) -> None:
    for more in (["--relation", "capitol"], ["--steps", "x"], ["--set", "n_tests=3"], ["--set", "n_test"]):
        done = CliRunner().invoke(app, ["link", str(runs / "a"), "--out", str(runs / "lc"), *more])
        assert done.exit_code == 2, (more, done.output)


def test_a_relation_of_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    samples = [{"subject": s, "object": o} for s, o in (
        ("France", "Paris"), ("South Korea", "Seoul"), ("Italy", "Rome"), ("Peru", "Lima"), ("Japan", "Tokyo"),
        ("Norway", "Oslo"), ("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("Chile", "Santiago"), ("Ghana", "Accra"),
    )]  # fmt: skip
    file = tmp_path / "capitals.json"
    file.write_text(json.dumps({"name": "capitals", "prompt_templates": ["The capital of {} is"], "samples": samples}))
    options = ["--set", "known=false", "--set", "shown=false", "--set", "ranks=2,4", "--set", "examples=3"]
    command = ["lre", str(runs / "a" / "step-0"), str(file), *options, "--set", "betas=1.0"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "lre")])
    assert done.exit_code == 0, done.output
    assert "capitals: 7 subjects judged" in done.output and (tmp_path / "lre" / "result.json").exists()
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert {row["what"] for row in told["sweep"]} == {"faithfulness", "causality"}
