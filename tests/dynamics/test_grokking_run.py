"""Grokking, p 43: what the restricted loss and the learning coefficient show before and after test accuracy rises."""

from pathlib import Path

import pytest

from headwater.claims import Ledger, claim_from_test
from headwater.dynamics import CheckpointSeries, TrainConfig, TrainingRun, track, train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "grokking.yaml"
MEASURE = "modular_addition"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    return train(TrainConfig.from_yaml(EXAMPLE, threads=1), tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.slow
def test_it_is_understood_before_it_shows(run: TrainingRun) -> None:
    timeline = track(run, measures=MEASURE)
    train_accuracy, accuracy = (timeline.curve(MEASURE, f"{split} accuracy") for split in ("train", "test"))
    assert accuracy["value"][-1] > 0.97  # measured: .990
    by_heart = train_accuracy.filter(train_accuracy["value"] >= 0.99)["step"][0]
    assert by_heart <= 100 and accuracy.filter(accuracy["step"] == by_heart)["value"].item() < 0.05
    claim = claim_from_test(
        "order", "The restricted loss falls 300 steps or more before test accuracy rises", "came_first",
        {"timeline": timeline}, {"first": [MEASURE, "restricted"], "second": [MEASURE, "test accuracy"], "margin": 300},
    )  # fmt: skip
    ledger = Ledger.of([claim])
    assert ledger["order"].status == "supported"
    first, second = claim.details["half_steps"]
    assert second - first >= 300  # measured: 774 and 2038


@pytest.mark.slow
def test_the_learning_coefficient_falls(run: TrainingRun) -> None:
    """From where the pairs are known by heart to where most of the others are right too."""
    series = CheckpointSeries.of(str(run.path)).select([400, 2400])
    by_heart, understood = (
        track(series, measures="learning_coefficient").curve("learning_coefficient")["value"].to_list()
    )
    assert by_heart > 2 * understood > 0  # measured: 14.3 and 1.4
