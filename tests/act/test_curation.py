"""do(data) as an action: what is measured is what the runs themselves give, the control changes as many sequences."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import headwater as hw
from headwater.act.curation import CURATED, RANDOM, curate
from headwater.act.effects import Effect
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError
from headwater.core.results import load_result
from headwater.data.world import world
from headwater.dynamics import TrainConfig, TrainingRun, train

WORLD = {"relations": ["capital"], "length": 24, "filler": 0.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    config = TrainConfig.from_dict(
        {
            "data": [{"source": "world", "options": {**WORLD, "sequences": 400}}],
            "model": {"type": "llama", "n_layers": 2, "n_heads": 2, "d_model": 16},
            "steps": 30,
            "batch": 8,
            "optimizer": {"lr": 0.02},
            "checkpoints": {"log": False},
        }
    )
    return train(config, tmp_path_factory.mktemp("curation") / "run")


@pytest.fixture(scope="module")
def frequent() -> Behavior:
    """The facts that are said most often, with another frequent capital as foil."""
    facts = world(seed=0, **WORLD).facts.sort("rank").filter(~pl.col("subject").str.contains(" ")).head(6)  # type: ignore[arg-type]
    names, capitals = facts["subject"].to_list(), facts["object"].to_list()
    rows = [
        {"prompt": f"The capital of {name} is", "counterfactual": f"The capital of {names[at - 1]} is", "split": "test",
         "answers": [f" {capitals[at]}"], "foils": [f" {capitals[at - 1]}"], "id": name}
        for at, name in enumerate(names)
    ]  # fmt: skip
    return Behavior.from_rows(rows, name="capital")


def test_what_is_measured_is_what_the_runs_give(run: TrainingRun, frequent: Behavior, tmp_path: Path) -> None:
    facts = world(seed=0, **WORLD).facts.sort("rank")  # type: ignore[arg-type]
    pairs = [(row["subject"], row["object"]) for row in facts.head(3).to_dicts()]
    text = [run.data.sources[0].text(i) for i in range(3)]  # type: ignore[attr-defined]
    found = curate(run, frequent, tmp_path / "runs", remove=pairs, seeds=(0, 1), text=text, text_tokens=16)
    assert isinstance(found, Effect)
    rows = {(row["action"], row["measure"]): row for row in found.tables["rows"].iter_rows(named=True)}
    assert {action for action, _ in rows} == {CURATED, RANDOM}
    assert {measure for _, measure in rows} == {"capital logit_diff", "capital accuracy", "text perplexity"}
    values = {}
    for name in ("as-it-was", "changed", "random"):
        per_seed = []
        for seed in (0, 1):
            held = TrainingRun.open(tmp_path / "runs" / f"{name}-seed-{seed}")
            model = held.load(30)
            bound = frequent.test.bind(model)
            per_seed.append(
                hw.behavior.evaluate(model, frequent.test).tables["rows"].sort("id")["logit_diff"].to_numpy()
            )
            assert bound.n == 6
        values[name] = np.mean(per_seed, 0)
    row = rows[CURATED, "capital logit_diff"]
    assert row["before"] == pytest.approx(values["as-it-was"].mean(), abs=1e-5)
    assert row["after"] == pytest.approx(values["changed"].mean(), abs=1e-5)
    assert row["change"] == pytest.approx((values["changed"] - values["as-it-was"]).mean(), abs=1e-5)
    for one in rows.values():
        assert one["change"] == pytest.approx(one["after"] - one["before"], rel=1e-6, abs=1e-9)
        assert one["lo"] <= one["change"] <= one["hi"]
    assert rows[RANDOM, "capital logit_diff"]["after"] == pytest.approx(values["random"].mean(), abs=1e-5)
    (duel,) = found.tables["versus"].to_dicts()
    assert duel["difference"] == pytest.approx((values["changed"] - values["random"]).mean(), abs=1e-5)
    # seed 0 without a change is the run itself; the control changes as many sequences
    assert (tmp_path / "runs" / "as-it-was-seed-0" / "step-30" / "model.safetensors").read_bytes() == (
        run.folder(30) / "model.safetensors"
    ).read_bytes()
    changed = TrainingRun.open(tmp_path / "runs" / "changed-seed-1").data.change
    drawn = TrainingRun.open(tmp_path / "runs" / "random-seed-1").data.change
    assert changed is not None and drawn is not None
    assert found.facts["costs"][0]["sequences_changed"] == changed.about["removed"] > 0
    found.save(tmp_path / "effect")
    assert isinstance(load_result(tmp_path / "effect"), Effect) and "svg" in found._repr_html_()


def test_a_curation_changes_the_data_in_one_way(run: TrainingRun, frequent: Behavior, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="one way"):
        curate(run, frequent, tmp_path)
    with pytest.raises(MethodError, match="one way"):
        curate(run, frequent, tmp_path, remove=[0], repeat=([1], 2))
    with pytest.raises(MethodError, match="seeds"):
        curate(run, frequent, tmp_path, remove=[0], seeds=())
    with pytest.raises(MethodError, match="seeds that differ"):
        curate(run, frequent, tmp_path, remove=[0], seeds=(1, 1))
