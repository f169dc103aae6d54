import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from headwater.core.errors import StoreError
from headwater.core.results import Result
from headwater.core.store import RUN_FORMAT, RunFolder

CONFIG = {"behavior": "ioi", "seed": 0}


def result(value: float) -> Result:
    return Result(tensors={"x": torch.full((3,), value)}, facts={"value": value})


def test_stages_come_back_and_a_run_of_the_same_config_goes_on(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as run:
        assert not run.has("localize") and run.stages == []
        run.save_stage("localize", {"patching": result(1), "scores": result(2)}, facts={"note": "n"})
    with RunFolder.create(tmp_path / "run", CONFIG) as run:
        assert run.has("localize") and run.stages == ["localize"]
        loaded = run.load_stage("localize", check=True)
        assert {name: r.facts["value"] for name, r in loaded.items()} == {"patching": 1, "scores": 2}
        assert run.facts("localize") == {"note": "n"}
        assert run.hashes() == {"localize": {"patching": result(1).content_hash, "scores": result(2).content_hash}}
        run.save_stage("localize", result(5))
        assert run.load("localize", "result").facts["value"] == 5
        run.remove_stage("localize")
        assert run.stages == []


def test_another_config_or_a_folder_with_other_things_is_refused(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as run:
        run.save_stage("behavior", result(1))
    with pytest.raises(StoreError, match="other values of seed"):
        RunFolder.create(tmp_path / "run", {**CONFIG, "seed": 1})
    assert RunFolder.open(tmp_path / "run").config == CONFIG
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(StoreError, match="something else"):
        RunFolder.create(tmp_path / "photos", CONFIG)
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


def test_a_run_that_stored_nothing_gives_way(tmp_path):
    RunFolder.create(tmp_path / "run", CONFIG).close()
    with RunFolder.create(tmp_path / "run", {**CONFIG, "seed": 1}) as run:
        assert run.config["seed"] == 1
    assert RunFolder.open(tmp_path / "run").config == {**CONFIG, "seed": 1}


def test_only_one_process_writes_and_anyone_reads(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as run:
        run.save_stage("behavior", result(1))
        with pytest.raises(StoreError, match="another process"):
            RunFolder.create(tmp_path / "run", CONFIG)
        reader = RunFolder.open(tmp_path / "run")
        assert reader.load("behavior", "result").facts["value"] == 1
        for attempt in (
            lambda: reader.save_stage("localize", result(1)),
            lambda: reader.remove_stage("behavior"),
            lambda: reader.write_file("report.html", "x"),
        ):
            with pytest.raises(StoreError, match="reading only"):
                attempt()
    RunFolder.open(tmp_path / "run", write=True).close()


def test_wrong_versions_stages_and_names_are_refused_with_the_mend(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as run:
        run.save_stage("localize", result(1))
        with pytest.raises(StoreError, match="localize"):
            run.load_stage("localise")
        with pytest.raises(StoreError, match="no such result"):
            run.load("localize", "resul")
        for bad in ("../x", "A", "", "a/b"):
            with pytest.raises(StoreError, match="not a stage's name"):
                run.has(bad)
        with pytest.raises(StoreError, match="must lie in its folder"):
            run.write_file("../report.html", "x")
    head = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**head, "format": RUN_FORMAT + 1}))
    for opener in (lambda: RunFolder.open(tmp_path / "run"), lambda: RunFolder.create(tmp_path / "run", CONFIG)):
        with pytest.raises(StoreError, match="Update headwater"):
            opener()
    with pytest.raises(StoreError, match="no such run"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"run\.json"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk_keeps_earlier_stages_readable(tmp_path, monkeypatch, code):
    with RunFolder.create(tmp_path / "run", CONFIG) as run:
        run.save_stage("behavior", result(1))

        def fail(path, data):
            path.write_bytes(data[:3])
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr("headwater.core.results.write_bytes", fail)
            with pytest.raises(StoreError, match=r"full|read-only"):
                run.save_stage("localize", result(2))
            with pytest.raises(StoreError):
                run.save_stage("behavior", result(3))
        assert run.stages == ["behavior"] and run.load("behavior", "result", check=True).facts["value"] == 1
        assert os.listdir(tmp_path / "run" / "stages") == ["behavior"]
        run.save_stage("localize", result(2))


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/run"):
        with pytest.raises(StoreError):
            RunFolder.create(tmp_path / folder, CONFIG)


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    run = RunFolder.create(tmp_path / "run", CONFIG)
    run.save_stage("behavior", result(1))
    run.close()
    stages = tmp_path / "run" / "stages"
    (stages / ".localize.tmp-0123456789ab").mkdir()
    (stages / ".localize.tmp-0123456789ab" / "part").write_text("half")
    os.rename(stages / "behavior", stages / ".behavior.old-0123456789ab")  # killed while it was being replaced
    (tmp_path / "run" / ".report.html.tmp-0123456789ab").write_text("half")
    (tmp_path / "run" / ".keep").write_text("the user's own")
    with RunFolder.open(tmp_path / "run", write=True) as run:
        assert run.load("behavior", "result", check=True).facts["value"] == 1
    assert sorted(os.listdir(tmp_path / "run")) == [".keep", "run.json", "run.lock", "stages"]
    assert os.listdir(stages) == ["behavior"]


def test_kill_nine_while_saving_frees_the_lock_and_leaves_whole_stages(tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        from headwater.core.results import Result
        from headwater.core.store import RunFolder
        run = RunFolder.create(sys.argv[1], {"a": 1})
        for i in range(10_000):
            run.save_stage(f"s{i}", Result(tensors={"x": torch.full((1000,), float(i))}, facts={"i": i}))
            print(i, flush=True)
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for _ in range(5):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with RunFolder.open(tmp_path / "run", write=True) as run:
        assert len(run.stages) >= 5
        for stage in run.stages:
            assert run.load(stage, "result", check=True).facts["i"] == int(stage[1:])
        assert not [name for name in os.listdir(tmp_path / "run" / "stages") if name.startswith(".")]
