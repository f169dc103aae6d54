"""The loss on the line between two sets of weights: against interpolation by hand, over a run and between models."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import headwater as hw
from headwater.cli import app
from headwater.core.errors import MethodError, ModelError
from headwater.core.results import load_result
from headwater.dynamics import TrainingRun, track, train
from headwater.dynamics.connectivity import barrier, connect
from headwater.dynamics.measures import Probe, measures
from lab_runs import small
from tiny import tiny_gpt2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    return train(small(steps=12, checkpoints={"every": 4, "log": False}), tmp_path_factory.mktemp("runs") / "run")


def test_losses_are_those_of_the_weights_between(run: TrainingRun) -> None:
    rows, at = (torch.from_numpy(one) for one in run.data.validation["validation"])
    a, b = run.load(0), run.load(12)
    found = connect(a, b, rows, loss_at=at, points=5)
    middle = run.load(0)
    with torch.no_grad():
        for weight, x, y in zip(middle.hf.parameters(), a.hf.parameters(), b.hf.parameters(), strict=True):
            weight.copy_(0.75 * x + 0.25 * y)
    losses = []
    for model in (a, middle, b):
        logits = model.run(rows).logits[:, :-1][:, at[1:]]
        losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:][:, at[1:]].flatten())))
    line = found.tables["line"].to_dicts()
    assert [line[0]["loss"], line[1]["loss"], line[4]["loss"]] == pytest.approx(losses, rel=1e-5)
    assert line[1]["straight"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-5)
    assert found.barrier == max(row["above"] for row in line) and line[0]["above"] == 0.0
    before = [weight.clone() for weight in run.load(0).hf.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(before, a.hf.parameters(), strict=True))


def test_a_planted_barrier() -> None:
    line = torch.tensor([[1.0, 1.2], [2.0, 2.2], [1.5, 1.6], [1.0, 1.2]])
    found = barrier(line)
    assert found["part"] == pytest.approx(1 / 3) and found["above"] == pytest.approx(1.0)
    assert found["above_lo"] == pytest.approx(1.0)


def test_over_a_run(run: TrainingRun, tmp_path: Path) -> None:
    found = track(run, measures="connectivity", settings={"connectivity": {"points": 3}}, draws=5, out=tmp_path)
    before, last = found.curve("connectivity", "before"), found.curve("connectivity", "last")
    assert before["step"].to_list() == [4, 8, 12] and last["step"].to_list() == [0, 4, 8]
    rows, at = (torch.from_numpy(one) for one in run.data.validation["validation"])
    by_hand = connect(run.folder(8), str(run.folder(12)), rows, loss_at=at, points=3).barrier
    assert last["value"][-1] == pytest.approx(by_hand, abs=1e-6)
    assert before["value"][-1] == pytest.approx(by_hand, abs=1e-6)  # of the same two


def test_what_has_no_line_is_refused(run: TrainingRun) -> None:
    a = run.load()
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ModelError, match="no line"):
        connect(a, hw.load(tiny_gpt2()), ids)
    with pytest.raises(MethodError, match="three places"):
        connect(a, a, ids, points=2)
    with pytest.raises(MethodError, match="checkpoints of a series"):
        measures.get("connectivity")(Probe(a, 0, ids=ids))


def test_from_the_command_line(run: TrainingRun, tmp_path: Path) -> None:
    ends = [str(run.folder(step)) for step in (0, 12)]
    done = CliRunner().invoke(app, ["connect", *ends, "--points", "3", "--json", "--out", str(tmp_path / "line")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["line"][1]["part"] == 0.5
    assert load_result(tmp_path / "line", check=True).kind == "connectivity"
    option = ["--set", "connectivity.points=3"]
    done = CliRunner().invoke(app, ["track", str(run.path), "--measures", "connectivity", *option, "--json"])
    assert done.exit_code == 0, done.output
    assert {row["name"] for row in json.loads(done.stdout)["values"]} == {"before", "last"}
    assert CliRunner().invoke(app, ["connect", "x", "y"]).exit_code == 2
    assert CliRunner().invoke(app, ["track", str(run.path), "--set", "points=3"]).exit_code == 2
