"""kill -9 at random moments: the same command goes on, and the run is the same to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headwater.dynamics import Timeline, TrainingRun, redo, track, train
from lab_runs import same_files, small

# A process of its own that trains in forked children and kills them: torch is loaded once, not once a kill.
DRIVER = """
import json, os, random, signal, sys, time
from headwater.dynamics import TrainConfig, track, train
import transformers.models.gpt2.modeling_gpt2

settings, out, kills, seed = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)

def work():
    if "track" in settings:
        track(settings["track"], out=out, **settings["options"])
    else:
        train(TrainConfig.from_dict(settings), out)

def child():
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\\n")
            os._exit(1)
        os._exit(0)
    return pid

done = 0
while done < kills:
    pid = child()
    time.sleep(chance.uniform(0.0, 0.6))
    if os.waitpid(pid, os.WNOHANG)[0]:
        break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    done += 1
status = os.waitstatus_to_exitcode(os.waitpid(child(), 0)[1])
print(json.dumps({"kills": done, "status": status}))
"""


def killed(settings: dict[str, Any], out: Path, kills: int, seed: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, json.dumps(settings), str(out), str(kills), str(seed)],
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kill_config(steps: int) -> Any:
    held = [
        {"do": 'force("pattern.0.h1", "previous_token")', "steps": [4, 30]},
        {"do": 'freeze("mlp_out.1")', "steps": [8, 20]},
    ]
    return small(steps=steps, interventions=held, threads=1, checkpoints={"every": 7, "save_seconds": 0})


def compare(config: Any, tmp_path: Path, kills: int, seed: int) -> int:
    told = killed(config.to_dict(), tmp_path / "killed", kills, seed)
    assert told["status"] == 0
    whole = train(config, tmp_path / "whole")
    cut = TrainingRun.open(tmp_path / "killed")
    assert cut.steps == whole.steps and same_files(cut.path, whole.path, whole.steps)
    assert cut.result.content_hash == whole.result.content_hash
    left = [entry.name for entry in cut.path.iterdir() if entry.name.startswith(".")]
    assert left == []
    return told["kills"]


def test_a_killed_run_gives_the_same_bits(tmp_path: Path) -> None:
    assert compare(kill_config(24), tmp_path, kills=3, seed=0) >= 2


@pytest.mark.slow
def test_twenty_kills_give_the_same_bits(tmp_path: Path) -> None:
    assert compare(kill_config(300), tmp_path, kills=20, seed=1) == 20


@pytest.mark.slow
def test_a_run_of_changed_data_killed_twenty_times_gives_the_same_bits(tmp_path: Path) -> None:
    base = train(kill_config(300), tmp_path / "base")
    change: dict[str, Any] = {"remove": [0, 5, 77], "reweight": ([9, 400], 0.5)}
    begun = redo(base, tmp_path / "killed", stop_at=0, **change)
    told = killed(begun.config.to_dict(), tmp_path / "killed", kills=20, seed=3)
    assert told["status"] == 0 and told["kills"] == 20
    whole = redo(base, tmp_path / "whole", **change)
    cut = TrainingRun.open(tmp_path / "killed")
    assert same_files(cut.path, whole.path, whole.steps) and cut.result.content_hash == whole.result.content_hash
    assert cut.result.content_hash != base.result.content_hash


@pytest.mark.slow
def test_tracking_killed_twenty_times_gives_the_same_timeline(tmp_path: Path) -> None:
    run = train(small(steps=200, checkpoints={"every": 5}), tmp_path / "run")
    options = {"measures": ["loss", "cka", "lens_depth"], "draws": 50}
    told = killed({"track": str(run.path), "options": options}, tmp_path / "t", kills=20, seed=2)
    assert told["status"] == 0 and told["kills"] >= 10
    whole = track(run, measures=("loss", "cka", "lens_depth"), draws=50)
    assert Timeline.load(tmp_path / "t" / "timeline", check=True).content_hash == whole.content_hash


@pytest.mark.slow
def test_the_command_itself_goes_on(tmp_path: Path) -> None:
    """`headwater train` killed while it writes checkpoints, and run again."""
    config = kill_config(300)
    (tmp_path / "c.yaml").write_text(json.dumps(config.to_dict()))  # JSON is YAML
    command = [sys.executable, "-m", "headwater", "train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "killed")]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = TrainingRun.open(tmp_path / "killed").steps if (tmp_path / "killed" / "train.json").exists() else []
        while process.poll() is None:
            time.sleep(0.2)
            if (tmp_path / "killed" / "train.json").exists():
                now = TrainingRun.open(tmp_path / "killed").steps
                if len(now) >= len(before) + 3:
                    break
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not TrainingRun.open(tmp_path / "killed").finished
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    whole = train(config, tmp_path / "whole")
    assert json.loads(done.stdout)["loss"] == whole.result.facts["loss"]
    assert TrainingRun.open(tmp_path / "killed").result.content_hash == whole.result.content_hash
