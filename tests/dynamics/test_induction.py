"""The optogenetics of induction heads: a head that is made to look at the token before brings induction forward."""

from pathlib import Path
from typing import Any

import pytest

from headwater.dynamics import TrainConfig, TrainingRun, train
from headwater.dynamics.transitions import crossing

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "induction.yaml"


def crossings(run: TrainingRun) -> dict[float, float]:
    """The steps at which the accuracy on 24 tokens said twice, of what the repetition tells, reaches each level."""
    table = run.result.tables["validation"]
    table = table.filter(table["name"] == "repeats")
    steps, accuracy = table["step"].to_numpy().astype(float), table["accuracy"].to_numpy()
    return {level: crossing(steps, accuracy, level, rising=True) for level in (0.1, 0.5, 0.9)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2, 3])  # 1 is the seed of the validation data
def test_induction_comes_at_once_and_earlier_with_a_previous_token_head(seed: int, tmp_path: Path) -> None:
    force = {"do": 'force("pattern.0.h0", "previous_token")'}
    held: dict[str, Any] = {"interventions": [force], "validation.1.held": True, "steps": 300}
    plain, forced = (
        crossings(train(TrainConfig.from_yaml(EXAMPLE, threads=1, seed=seed, **more), tmp_path / name))
        for name, more in (("plain", {"checkpoints.log": False, "checkpoints.every": 800}), ("forced", held))
    )
    assert plain[0.9] - plain[0.1] <= 200  # measured: 175, 160 and 92
    assert plain[0.5] - forced[0.5] >= 60  # measured: 268, 457 and 258
    assert plain[0.1] - forced[0.1] >= 60
