"""The whole trace on a tiny model: stored by stage, resumable after kill -9 at any moment, verifiable."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from headwater.claims import Ledger
from headwater.core.errors import StoreError
from headwater.core.store import RunFolder
from headwater.trace.config import OF_HISTORY, STAGES
from headwater.trace.investigation import Investigation
from headwater.trace.stages import smallest_faithful
from headwater.trace.verify import verify

SMALL = {
    "n": 24,
    "localize": {"n_patch": 2, "steps": 2, "n_attribution": 6, "patch_sites": ["resid_post.*"]},
    "circuit": {"n_choose": 4, "n_test": 8, "fractions": [0.1, 0.3, 1.0]},
    "heads": {"least": 0.02, "top": 1, "sequences": 2, "length": 5, "null_heads": 2, "n_train": 6, "n_test": 8},
    "claims": {
        "n_test": 8, "null_circuits": 4, "n_null": 6, "random_sets": 2, "random_groups": 2,
        "n_heads_test": 8, "random_models": 1,
        "n_random_models": 4,
    },
    "act": {"n": 4, "n_train": 12, "n_search": 4, "others": ["agreement"], "n_others": 4, "texts": 1, "text_tokens": 8,
            "controls": 1},
}  # fmt: skip
BEFORE_REPORT = tuple(stage for stage in STAGES if stage not in (*OF_HISTORY, "report"))  # a model with no history


def settings(folder: Path, model: Path, **more) -> dict:
    return {"behavior": "ioi", "model": str(model), "out": str(folder), **SMALL, **more}


def in_process(folder: Path, model: Path) -> subprocess.Popen[bytes]:
    script = "import json, sys; from headwater.trace.investigation import Investigation; "
    script += "Investigation(**json.loads(sys.argv[1])).run()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(settings(folder, model, stages=BEFORE_REPORT))], env=environment
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_folder, tiny_model) -> Path:
    """A whole run in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert in_process(folder, tiny_folder).wait() == 0
    return folder


def test_every_stage_is_stored_and_every_claim_has_what_it_needs(undisturbed):
    run = RunFolder.open(undisturbed)
    assert set(run.stages) == set(BEFORE_REPORT)
    for stage in run.stages:
        for result in run.load_stage(stage, check=True).values():
            assert result.kind
    ledger = run.load("claims", "ledger")
    assert isinstance(ledger, Ledger)
    ids = {claim.id for claim in ledger}
    assert {"behavior-accuracy", "behavior-counterfactual", "circuit-sufficient", "circuit-necessary"} <= ids
    assert {"circuit-beats-edges", "circuit-beats-heads", "circuit-beats-random-weights"} <= ids
    assert any(name.startswith("role-") for name in ids)
    for claim in ledger:
        assert claim.n >= 6 and claim.test and claim.params and claim.command.startswith("headwater verify")
        assert claim.p is not None and 0 < claim.p <= 1
    null = run.load("claims", "null").tables["draws"]
    assert null.height == 8 and ledger["circuit-beats-edges"].null_draws == tuple(null.filter(kind="edges")["value"])
    assert run.facts("claims")["verdict"] and run.facts("behavior")["kept"] == 24
    # a random model does nothing: nothing may be said to explain it
    assert not [claim.id for claim in ledger.by_status("supported") if claim.id.startswith(("circuit", "role"))]


def test_folder_tells_nothing_of_where_it_was_made(undisturbed):
    head = json.loads((undisturbed / "run.json").read_text())
    assert "out" not in head["config"] and "stages" not in head["config"]
    assert str(undisturbed.parent) not in json.dumps(run_texts(undisturbed))


def run_texts(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.rglob("*.json") if path.name not in ("provenance.json",)]


@pytest.mark.parametrize(
    "stage", ["circuit", *(pytest.param(s, marks=pytest.mark.slow) for s in ("", "behavior", "claims"))]
)
def test_killed_at_any_moment_and_resumed_equals_undisturbed(undisturbed, tiny_folder, tmp_path, stage):
    """SIGKILL while run.json is hardly there, and in the middle of the stage that follows `stage`."""
    folder = tmp_path / "killed"
    child = in_process(folder, tiny_folder)
    awaited = folder / "stages" / stage / "stage.json" if stage else folder / "run.json"
    deadline = time.monotonic() + 240
    while not awaited.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    interrupted = RunFolder.open(folder).stages
    assert len(interrupted) < len(BEFORE_REPORT)
    resumed = in_process(folder, tiny_folder)
    assert resumed.wait() == 0
    assert RunFolder.open(folder).hashes() == RunFolder.open(undisturbed).hashes()
    assert [RunFolder.open(folder).facts(s) for s in BEFORE_REPORT] == [
        RunFolder.open(undisturbed).facts(s) for s in BEFORE_REPORT
    ]
    assert not [path.name for path in folder.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]
    for stored in ("circuit/circuit/tensors.safetensors", "claims/ledger/claims.parquet", "act/effect/rows.parquet"):
        assert (folder / "stages" / stored).read_bytes() == (undisturbed / "stages" / stored).read_bytes()


def test_resume_writes_the_report_and_does_nothing_twice(undisturbed, tiny_model, monkeypatch):
    before = RunFolder.open(undisturbed).hashes()
    run = Investigation.resume(undisturbed)
    page = undisturbed / "report.html"
    assert run.has("report") and "<html" in page.read_text()
    assert {stage: found for stage, found in run.hashes().items() if stage != "report"} == before
    page.unlink()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded though nothing is left to compute")

    monkeypatch.setattr("headwater.core.loading.load", never)
    Investigation.resume(undisturbed)
    assert page.exists()


def test_verify_finds_the_same_and_sees_what_was_changed(undisturbed):
    outcome = verify(undisturbed)
    assert outcome.same and outcome.tables["claims"].height == len(
        RunFolder.open(undisturbed).load("claims", "ledger").facts["claims"]
    )
    with RunFolder.open(undisturbed, write=True) as run:
        ledger = run.load("claims", "ledger")
        assert isinstance(ledger, Ledger)
        honest = run.load_stage("claims"), run.facts("claims")
        forged = [
            {**data, "effect": 0.99, "p": 0.001} if data["id"] == "behavior-accuracy" else data
            for data in ledger.facts["claims"]
        ]
        ledger.facts["claims"] = forged
        run.save_stage("claims", {**honest[0], "ledger": ledger}, facts=honest[1])
    try:
        outcome = verify(undisturbed)
        assert outcome.tables["claims"].filter(~pl.col("same"))["id"].to_list() == ["behavior-accuracy"]
        file = undisturbed / "stages" / "circuit" / "circuit" / "edges.parquet"
        kept = file.read_bytes()
        pl.read_parquet(file).head(1).write_parquet(file)
        with pytest.raises(StoreError, match="not what was saved"):
            verify(undisturbed)
        file.write_bytes(kept)
    finally:
        with RunFolder.open(undisturbed, write=True) as run:
            run.save_stage("claims", honest[0], facts=honest[1])
    assert verify(undisturbed).same


def test_another_model_or_config_is_refused(undisturbed, tiny_gpt2_model, tiny_folder):
    with RunFolder.open(undisturbed, write=True) as run:
        run.remove_stage("act")
    with pytest.raises(StoreError, match="no longer the one"):
        Investigation.resume(undisturbed, model=tiny_gpt2_model)
    with pytest.raises(StoreError, match="other values of seed"):
        Investigation(**settings(undisturbed, tiny_folder, seed=1)).run()
    with pytest.raises(StoreError, match="no such run"):
        Investigation.resume(undisturbed / "nowhere")


def test_verify_needs_claims(tmp_path, tiny_folder, tiny_model):
    run = Investigation(**settings(tmp_path / "run", tiny_folder, stages=("behavior",))).run(model=tiny_model)
    assert run.stages == ["behavior"]
    with pytest.raises(StoreError, match="no claims yet"):
        verify(tmp_path / "run")


def test_full_disk_in_a_stage_keeps_the_earlier_ones(tmp_path, tiny_folder, tiny_model, monkeypatch):
    investigation = Investigation(**settings(tmp_path / "run", tiny_folder, stages=("localize",)))
    from headwater.trace import stages

    def full(_work):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(stages.STAGE_FUNCTIONS, "localize", full)
    with pytest.raises(StoreError, match="resume"):
        investigation.run(model=tiny_model)
    assert RunFolder.open(tmp_path / "run").load("behavior", "report", check=True).kind == "behavior_report"


def test_smallest_faithful_takes_the_first_that_is_close_enough():
    def table(*values):
        return pl.DataFrame(
            {
                "fraction": [0.01, 0.1, 1.0][: len(values)],
                "edges": [1, 10, 100][: len(values)],
                "faithfulness": list(values),
            }
        )

    assert smallest_faithful(table(0.5, 0.85, 1.0), 0.8) == (0.1, True)
    assert smallest_faithful(table(1.9, 1.1, 1.0), 0.8) == (0.1, True)  # overshooting is not faithful
    assert smallest_faithful(table(0.1, 0.4), 0.8) == (0.1, False)
    assert smallest_faithful(table(None, 0.9, 1.0), 0.8) == (0.1, True)
