"""headwater train and headwater track, as they are typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headwater.cli import app
from headwater.dynamics import Timeline, TrainingRun

CONFIG = """
name: small
model: {d_model: 16, n_heads: 2}
data: [{source: induction, options: {vocabulary: 12, length: 12}}]
validation: [{source: induction, options: {vocabulary: 12, length: 12, seed: 3}, sequences: 6}]
steps: 8
batch: 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "c.yaml").write_text(CONFIG)
    done = CliRunner().invoke(app, ["train", str(folder / "c.yaml"), "--out", str(folder / "run"), "--set", "seed=4"])
    assert done.exit_code == 0, done.output
    assert "small: 8 steps" in done.output and "validation" in done.output
    return folder / "run"


def test_a_run_is_trained_and_said_again_as_json(run: Path) -> None:
    assert TrainingRun.open(run).config.seed == 4
    command = ["train", str(run.parent / "c.yaml"), "--out", str(run), "--set", "seed=4", "--json"]
    done = CliRunner().invoke(app, command)
    told = json.loads(done.stdout)
    assert told["steps"] == 8 and told["checkpoints"] == [0, 1, 2, 4, 8] and told["validation"][0]["step"] == 8


def test_a_run_is_tracked(run: Path, tmp_path: Path) -> None:
    command = [
        "track",
        str(run),
        "--measures",
        "loss,heads",
        "--checkpoints",
        "4",
        "--audit",
        "--out",
        str(tmp_path / "t"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "At step 8, the last of 4" in done.output and "No checkpoint of run" in done.output
    assert Timeline.load(tmp_path / "t" / "timeline").curve("loss")["step"].to_list() == [0, 1, 4, 8]
    (tmp_path / "text.txt").write_text("t1 t2 t3 t1 t2 t3 t1 t2 t3 t1 t2 t3\nt4 t5 t4 t5\n")
    told = CliRunner().invoke(
        app, ["track", str(run), "--steps", "0,8", "--text", str(tmp_path / "text.txt"), "--json"]
    )
    assert [row["step"] for row in json.loads(told.stdout)["values"] if row["name"] == ""] == [0, 8]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["track", "RUN", "--measures", "los"], "loss"),
        (["track", "RUN", "--steps", "x"], "takes numbers"),
        (["track", "RUN", "--n", "5"], "--behavior"),
        (["track", "/no/such/folder"], "no such checkpoints"),
        (["train", "no.yaml", "--out", "x"], "cannot read"),
        (["train", "CONFIG", "--out", "x", "--set", "stpes=3"], "steps"),
        (["train", "CONFIG", "--out", "x", "--set", "seed"], "NAME=VALUE"),
    ],
)
def test_mistakes_leave_with_two(run: Path, arguments: list[str], said: str) -> None:
    places = {"RUN": str(run), "CONFIG": str(run.parent / "c.yaml")}
    done = CliRunner().invoke(app, [places.get(one, one) for one in arguments])
    assert done.exit_code == 2 and said in done.output
    assert not Path("x").exists()
