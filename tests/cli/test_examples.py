"""headwater nearest and headwater memorized, as they are typed."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from headwater.cli import app
from headwater.core.results import load_result
from headwater.data import memorized, nearest
from headwater.dynamics import TrainConfig, TrainingRun, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    folder = tmp_path_factory.mktemp("examples")
    random = np.random.default_rng(0)
    np.save(folder / "rows.npy", random.integers(0, 20, (60, 12)))
    np.save(folder / "held.npy", random.integers(0, 20, (30, 12)))
    settings = {
        "model": {"d_model": 16, "n_heads": 2}, "vocabulary": 20, "steps": 10, "batch": 8, "threads": 1,
        "data": [{"source": str(folder / "rows.npy")}], "checkpoints": {"log": False},
    }  # fmt: skip
    return train(TrainConfig.from_dict(settings), folder / "run")


def typed(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_nearest_of_a_run_and_of_a_checkpoint(run: TrainingRun, tmp_path: Path) -> None:
    row = run.order.tokens(5)
    ids = " ".join(map(str, row.tolist()))
    plain = nearest(run.load(), [row.tolist(), [1, 2, 3]], run.order, k=3)
    command = ["nearest", run.path, "--ids", ids, "--ids", "1,2,3", "--set", "k=3"]
    told = json.loads(typed(*command, "--json", "--out", tmp_path / "out"))
    kept = load_result(tmp_path / "out", check=True)
    assert kept.tables["nearest"].equals(plain.tables["nearest"])
    assert [one["sequence"] for one in told["nearest"]] == plain.tables["nearest"]["sequence"].to_list()
    assert told["queries"][0]["n"] == run.order.n_sequences
    assert "80 sequences" in typed(*command)
    # a checkpoint is of its run; a corpus that is given is the one
    assert json.loads(typed("nearest", run.folder(10), *command[2:], "--json"))["nearest"] == told["nearest"]
    rows = json.loads(
        typed("nearest", run.folder(10), "--corpus", run.path.parent / "rows.npy", *command[2:], "--json")
    )
    assert rows["queries"][0]["n"] == 60


def test_memorized_beside_held_sequences(run: TrainingRun, tmp_path: Path) -> None:
    held = run.path.parent / "held.npy"
    plain = memorized(run.load(), run.order, held, prompt=4, continuation=8)
    command = ["memorized", run.path, "--held", held, "--set", "prompt=4", "--set", "continuation=8"]
    told = json.loads(typed(*command, "--json", "--out", tmp_path / "out"))
    assert load_result(tmp_path / "out", check=True).tables["repeats"].equals(plain.tables["repeats"])
    assert told["repeats"][0]["seen_to"] == 0 and told["repeats"][0]["n"] == 30
    assert pl.DataFrame(told["sequences"]).height == 90
    assert "of 60 of the 60 distinct sequences" in typed(*command)


def test_mistakes_leave_with_2(run: TrainingRun, tmp_path: Path) -> None:
    held = ["--held", str(run.path.parent / "held.npy")]
    run.load().hf.save_pretrained(tmp_path / "model")
    for wrong in (
        ["nearest", str(run.path)],
        ["nearest", str(run.path), "--ids", "a"],
        ["nearest", str(run.path), "--ids", ""],
        ["nearest", str(run.path), "--ids", "1", "--set", "kk=3"],
        ["nearest", str(tmp_path / "model"), "--ids", "1"],
        ["memorized", str(run.path)],
        ["memorized", str(run.path), *held],  # 64 tokens are more than these sequences have
        ["memorized", str(tmp_path / "model"), *held],
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2, (wrong, done.output)
