"""The plateau of the moving sum: the model repeats itself and its positions look alike before it is right; attention to
the right places shortens the wait (Gopalani and Hu, 2025)."""

from pathlib import Path
from typing import Any

import pytest

from headwater.dynamics import TrainConfig, TrainingRun, track, train
from headwater.dynamics.transitions import crossing

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plateau.yaml"
# each sum is told at a place from which its two terms are 16 and 17 back
STRONGER = [{"do": f'scale("pattern.0", 10, at="back:{back}")'} for back in (16, 17)]


def half(run: TrainingRun) -> float:
    """The step at which the validation accuracy, under the run's own interventions, is a half."""
    table = run.result.tables["validation"]
    return crossing(table["step"].to_numpy().astype(float), table["accuracy"].to_numpy(), 0.5, rising=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_repetition_and_collapse_come_first_and_attention_shortens_it(seed: int, tmp_path: Path) -> None:
    run = train(TrainConfig.from_yaml(EXAMPLE, threads=1, seed=seed), tmp_path / "plain")
    timeline = track(run, measures=("repetition", "collapse"), draws=5)
    for curve, most in ((("repetition", ""), 0.8), (("collapse", "layer 0"), 0.95)):
        found = timeline.curve(*curve)
        peak = found.sort("value", descending=True).row(0, named=True)
        assert peak["value"] >= most and half(run) - peak["step"] >= 20
        assert found["value"][-1] < 0.2  # and it is over when the sums are right
    more: dict[str, Any] = {"interventions": STRONGER, "validation.0.held": True}
    stronger = train(TrainConfig.from_yaml(EXAMPLE, threads=1, seed=seed, **more), tmp_path / "stronger")
    assert half(stronger) <= 0.8 * half(run)
