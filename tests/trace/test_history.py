"""The stages about a model's history on a tiny world: stored, killed and resumed, verified, reported; without a history
they are not run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from headwater.claims import Ledger
from headwater.core.errors import StoreError
from headwater.core.store import RunFolder
from headwater.dynamics import TrainConfig, TrainingRun, train
from headwater.trace.config import OF_HISTORY
from headwater.trace.history import load_last
from headwater.trace.investigation import Investigation
from headwater.trace.verify import verify

from .test_trace import SMALL

STAGES = ("claims",)
LITTLE = {
    "name": "little",
    "data": [{"source": "world", "options": {"relations": ["capital", "region", "continent"], "length": 24,
                                             "exponent": 0.5, "filler": 0.05}}],
    "model": {"type": "llama", "n_layers": 1, "n_heads": 2, "d_model": 8},
    "steps": 12, "batch": 8, "optimizer": {"lr": 0.02}, "checkpoints": {"log": False, "every": 2},
}  # fmt: skip
FEW = {
    "timeline": {"checkpoints": 7, "n": 12, "sequences": 2, "length": 12, "draws": 19},
    "data": {"draws": 19, "checkpoints": 2, "n_facts": 6},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A little world, trained for a dozen steps."""
    folder = tmp_path_factory.mktemp("world") / "run"
    train(TrainConfig.from_dict(LITTLE), folder)
    return folder


def settings(folder: Path, model: Path, **more) -> dict:
    return {"behavior": "capitals", "model": str(model), "out": str(folder), **SMALL, "n": 60, **FEW, **more}


def in_process(folder: Path, model: Path) -> subprocess.Popen[bytes]:
    script = "import json, sys; from headwater.trace.investigation import Investigation; "
    script += "Investigation(**json.loads(sys.argv[1])).run()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = json.dumps(settings(folder, model, stages=STAGES))
    return subprocess.Popen([sys.executable, "-c", script, told], env=environment)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    Investigation(**settings(folder, world, stages=STAGES)).run()
    return folder


def test_every_stage_about_the_history_is_stored_with_its_claims(undisturbed, world):
    run = RunFolder.open(undisturbed)
    assert set(OF_HISTORY) <= set(run.stages)
    names = {stage: set(run.hashes()[stage]) for stage in OF_HISTORY}
    assert names["timeline"] == {"timeline", "formation"} and "counts" in names["data"]
    assert {"strengths", "relation_counts", "link"} <= names["data"]
    formation = run.load("timeline", "formation", check=True)
    assert formation.facts["steps"] == TrainingRun.open(world).steps
    assert formation.tables["pairs"].height == 7 * 24
    measured = set(run.load("timeline", "timeline").tables["values"]["measure"].to_list())
    assert measured == {"loss", "behavior", "heads", "circuit"}
    assert "change" in run.hashes()["do_data"] and run.facts("do_data")["how"] == "permute"
    assert set(run.facts("do_data")["checkpoints"]) == {"0", "2", "4", "6", "8", "10", "12"}
    ledger = run.load("claims", "ledger")
    assert isinstance(ledger, Ledger) and {"link-causality", "do-data"} <= {claim.id for claim in ledger}
    assert not (undisturbed / "work" / "timeline" / "parts").exists()
    assert str(undisturbed.parent) not in "".join(
        path.read_text() for path in (undisturbed / "stages").rglob("*.json") if path.name != "provenance.json"
    )


def test_counts_are_those_of_the_rebuilt_corpus(undisturbed, world):
    """By hand: lines of the sequences that the checkpoint had seen."""
    counts: Any = RunFolder.open(undisturbed).load("data", "counts")
    order = TrainingRun.open(world).order
    tokenizer: Any = order.data.tokenizer
    lines = [
        line for k in range(order.seen(6)) for line in tokenizer.decode(order.tokens(k)).replace(" ", "  ").split("\n")
    ]
    seen = counts.by(6).filter(pl.col("n") > 0)
    assert seen.height
    for row in seen.head(5).to_dicts():
        subject, thing = (row[side].replace(" ", "  ") for side in ("subject", "object"))
        assert row["n"] == sum(f" {subject} " in f" {line} " and f" {thing} " in f" {line} " for line in lines)


@pytest.mark.parametrize(
    "stage", ["heads", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("timeline", "data"))]
)
def test_killed_in_a_long_stage_and_resumed_equals_undisturbed(undisturbed, world, tmp_path, stage):
    """SIGKILL in the middle of the stage after `stage`, when it has something of its own to go on from."""
    folder = tmp_path / "killed"
    child = in_process(folder, world)
    deadline = time.monotonic() + 240
    begun = folder / "work" / {"heads": "timeline", "timeline": "data", "data": "do_data"}[stage]
    while not begun.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    interrupted = RunFolder.open(folder).stages
    assert "claims" not in interrupted
    Investigation(**settings(folder, world, stages=STAGES)).run()
    one, other = RunFolder.open(folder), RunFolder.open(undisturbed)
    hashes = one.hashes()
    assert {name: hashes[name] for name in other.stages} == other.hashes()
    assert [one.facts(name) for name in other.stages] == [other.facts(name) for name in other.stages]


def test_verify_measures_again_and_knows_the_second_run_by_hash(undisturbed, world, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    outcome = verify(folder)
    assert outcome.same, outcome.tables["claims"].filter(~pl.col("same")).to_dicts()
    file = folder / "work" / "do_data" / "run" / "step-2" / "model.safetensors"
    shutil.copy(folder / "work" / "do_data" / "run" / "step-4" / "model.safetensors", file)
    with pytest.raises(StoreError, match="not the one that was measured"):
        verify(folder)


def test_a_claim_about_data_is_open_without_do_data(world, tmp_path):
    run = Investigation(**settings(tmp_path / "run", world, stages=STAGES, do_data={"how": "none"})).run()
    assert "do_data" not in run.stages and "data" in run.stages
    ledger = run.load("claims", "ledger")
    assert isinstance(ledger, Ledger)
    of_data = [claim for claim in ledger if claim.stage == "data"]
    assert of_data and all(claim.why_not and claim.status == "inconclusive" for claim in of_data)


def test_a_model_from_elsewhere_has_no_history_unless_given(world, tmp_path):
    last = str(TrainingRun.open(world).folder(12))
    plain = Investigation(**settings(tmp_path / "plain", world) | {"model": last})
    assert not set(OF_HISTORY) & set(plain.planned)
    given = Investigation(**settings(tmp_path / "given", world, history=str(world)) | {"model": last})
    assert set(OF_HISTORY) <= set(given.planned)
    run = given.model_copy(update={"stages": ("timeline",)}).run()
    assert run.load("timeline", "formation").facts["steps"] == [0, 2, 4, 6, 8, 10, 12]


def test_a_run_is_loaded_by_its_last_checkpoint_once_it_is_over(world, tmp_path):
    model = load_last(world)
    assert model.name == "little (step 12)"
    train(TrainConfig.from_dict(LITTLE), tmp_path / "half", stop_at=4)
    with pytest.raises(StoreError, match="not over"):
        load_last(tmp_path / "half")
    with pytest.raises(StoreError, match="not over"):
        Investigation(**settings(tmp_path / "run", tmp_path / "half")).run()


@pytest.mark.slow
def test_a_second_process_trains_meanwhile_and_ends_with_the_first(undisturbed, world, tmp_path, monkeypatch):
    """The results are those of one process; and where the first is killed, the second lets go of its run."""
    from headwater.core.store import take_lock
    from headwater.trace import redoing

    monkeypatch.setattr(redoing, "_WORTH_IT", 0.0)
    monkeypatch.setattr(redoing.os, "sched_getaffinity", lambda _: {0, 1})
    begun = []
    monkeypatch.setattr(redoing, "begin", lambda work, begin=redoing.begin: begun.append(begin(work)) or begun[-1])
    run = Investigation(**settings(tmp_path / "two", world, stages=STAGES)).run()
    processes = [one for one in begun if one is not None]
    assert processes and all(one.poll() is not None for one in processes)
    assert run.hashes() == RunFolder.open(undisturbed).hashes()
    script = (
        "import json, sys; from headwater.trace import redoing; redoing._WORTH_IT = 0.0; "
        "redoing.os.sched_getaffinity = lambda _: {0, 1}; "
        "from headwater.trace.investigation import Investigation; Investigation(**json.loads(sys.argv[1])).run()"
    )
    folder = tmp_path / "killed"
    told = json.dumps(settings(folder, world, stages=STAGES))
    child = subprocess.Popen([sys.executable, "-c", script, told], env={**os.environ, "OMP_NUM_THREADS": "1"})
    second = redoing_folder(folder)
    deadline = time.monotonic() + 240
    while not (second / "run.lock").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    while True:
        try:
            take_lock(second).close()
            break
        except StoreError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    Investigation(**settings(folder, world, stages=STAGES)).run()
    assert RunFolder.open(folder).hashes() == RunFolder.open(undisturbed).hashes()


def redoing_folder(run: Path) -> Path:
    return run / "work" / "do_data" / "run"


@pytest.mark.slow
def test_facts_are_taken_out(world, tmp_path):
    told = settings(tmp_path / "run", world, stages=("do_data",), do_data={"how": "remove", "share": 0.25})
    run = Investigation(**told).run()
    facts = run.facts("do_data")
    gone = {tuple(pair) for pair in facts["removed"]}
    assert facts["how"] == "remove" and len(gone) == round(0.25 * run.facts("data")["n_facts"])
    counts: Any = run.load("do_data", "counts")
    after = {(row["subject"], row["object"]): row["n"] for row in counts.by(12).to_dicts()}
    assert all(after[pair] == 0 for pair in gone) and any(after.values())
