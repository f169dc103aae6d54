"""The learning coefficient: d/2 of a quadratic, less where directions are flat; the weights are left as they were."""

import math

import pytest
import torch

from headwater.core.errors import MethodError
from headwater.dynamics import TrainingRun, track, train
from headwater.dynamics.measures import Probe, measures
from headwater.dynamics.measures.learning_coefficient import sampled
from lab_runs import small

N = 1000


def quadratic(curvature: torch.Tensor, *, step_size: float, power: int = 2, steps: int = 20_000) -> float:
    """The estimate for the loss 1/2 sum of curvature times w^power."""
    w = torch.zeros(len(curvature), dtype=torch.float64, requires_grad=True)
    return sampled(
        lambda part: 0.5 * (curvature * w**power).sum(), [w], n=N, rows=N, batch=None, steps=steps, burn=500,
        step_size=step_size, localization=0.0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_of_a_quadratic_it_is_half_the_dimension() -> None:
    """SGLD's stationary variance on a quadratic of precision a is 1 / (a (1 - step a / 4)): known to the last bit."""
    d, around = 20, N / math.log(N)
    step = 0.4 / around
    found = quadratic(torch.ones(d, dtype=torch.float64), step_size=step)
    assert found == pytest.approx(d / 2 / (1 - step * around / 4), rel=0.05)
    curvature = torch.linspace(0.5, 2, d, dtype=torch.float64)
    exact = sum(0.5 / (1 - step * around * float(h) / 4) for h in curvature)
    assert quadratic(curvature, step_size=step) == pytest.approx(exact, rel=0.05)


def test_flat_directions_count_for_nothing_and_quartic_ones_for_a_quarter() -> None:
    curvature = torch.cat([torch.ones(6), torch.zeros(6)]).double()
    around = N / math.log(N)
    assert quadratic(curvature, step_size=0.05 / around) == pytest.approx(3.0, rel=0.12)
    quartic = quadratic(torch.ones(8, dtype=torch.float64), power=4, step_size=0.02 / math.sqrt(around))
    assert quartic == pytest.approx(2.0, rel=0.2)


def test_batches_agree_with_all_rows() -> None:
    x = torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def loss(part: torch.Tensor | None) -> torch.Tensor:
        return 0.5 * ((x if part is None else x[part]) @ w).square().mean()

    found = {
        batch: sampled(
            loss, [w], n=N, rows=N, batch=batch, steps=4000, burn=300, step_size=0.001, localization=0.0,
            generator=torch.Generator().manual_seed(2),
        )
        for batch in (None, 200)
    }  # fmt: skip
    assert found[None] == pytest.approx(3.0, rel=0.15) and found[200] == pytest.approx(found[None], rel=0.25)
    assert float(w.detach().abs().max()) == 0.0  # put back


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    return train(small(steps=8, checkpoints={"every": 4}), tmp_path_factory.mktemp("runs") / "run")


def test_as_a_measure(run: TrainingRun) -> None:
    settings = {"learning_coefficient": {"chains": 2, "steps": 5, "burn": 1, "batch": 4}}
    found = track(run, measures="learning_coefficient", settings=settings, draws=5)
    again = track(run, measures="learning_coefficient", settings=settings, draws=5)
    curve = found.curve("learning_coefficient")
    assert curve["step"].to_list() == [0, 1, 2, 4, 8] and curve["value"].is_finite().all()
    assert found.tables["values"].equals(again.tables["values"])
    model = run.load()
    before = [weight.clone() for weight in model.hf.parameters()]
    rows, at = run.data.validation["validation"]
    probe = Probe(model, 8, ids=torch.from_numpy(rows), loss_at=torch.from_numpy(at))
    assert len(measures.get("learning_coefficient")(probe, chains=1, steps=2)) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))
    few = Probe(model, 8, ids=torch.from_numpy(rows[:1, :2]))
    with pytest.raises(MethodError, match="two predicted tokens"):
        measures.get("learning_coefficient")(few)
    with pytest.raises(MethodError, match="SGLD"):
        measures.get("learning_coefficient")(probe, chains=0)
