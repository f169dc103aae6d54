"""The optogenetics of induction heads: a head that is made to look at the token before brings induction forward."""

from pathlib import Path
from typing import Any

import pytest

from headwater.dynamics import TrainConfig, TrainingRun, train
from headwater.dynamics.transitions import crossing

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "induction.yaml"


def crossings(run: TrainingRun) -> dict[float, float]:
    """The steps at which the validation accuracy reaches shares of its final value."""
    table = run.result.tables["validation"]
    steps, accuracy = table["step"].to_numpy().astype(float), table["accuracy"].to_numpy()
    top = float(accuracy[-3:].mean())
    assert top > 0.45  # what can be known of sequences that begin at random, and repeat after 12 to 24 of 48 tokens
    return {share: crossing(steps, accuracy, share * top, rising=True) for share in (0.2, 0.5, 0.9)}


@pytest.mark.slow
def test_a_forced_previous_token_head_brings_induction_forward(tmp_path: Path) -> None:
    force = {"do": 'force("pattern.0.h0", "previous_token")'}
    held: dict[str, Any] = {"interventions": [force], "validation.0.held": True}
    plain, forced = (
        crossings(train(TrainConfig.from_yaml(EXAMPLE, threads=1, **more), tmp_path / name))
        for name, more in (("plain", {}), ("forced", held))
    )
    assert plain[0.9] - plain[0.2] <= 200  # it comes at once
    assert plain[0.5] - forced[0.5] >= 60  # measured: 455 and 192
