"""Two processes under torch's launcher: the same data, the same losses up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater.core.errors import MethodError
from headwater.dynamics import TrainingRun, train
from headwater.dynamics.lab.processes import Processes
from lab_runs import small, weights


def test_rows_are_shared_evenly() -> None:
    assert [list(range(8))[Processes(rank, 4).mine(8)] for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(MethodError, match="cannot be shared evenly"):
        Processes(0, 3).mine(8)


def test_two_processes_train_the_same_model(tmp_path: Path) -> None:
    config = small(
        dtype="float64", threads=1, model={"d_model": 16, "n_heads": 2}, steps=8,
        interventions=[
            {"do": 'force("pattern.0.h1", "previous_token")', "steps": [2, 6]},
            {"do": 'penalize("pattern.1.h0", "induction", weight=0.1)'},
            {"do": 'freeze("mlp_out.0")', "steps": [3, 5]},
        ],
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(config.to_dict()))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "headwater",
        "train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    two = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    one = train(config, tmp_path / "one")
    stdout, stderr = two.communicate(timeout=200)
    assert two.returncode == 0, stderr
    assert stdout.count("checkpoints in") == 1  # one process speaks
    both = TrainingRun.open(tmp_path / "two")
    assert both.steps == one.steps and np.array_equal(both.order.step(5), one.order.step(5))
    assert np.allclose(both.curve["loss"], one.curve["loss"], rtol=1e-10)
    assert np.allclose(both.curve["grad_norm"], one.curve["grad_norm"], rtol=1e-8)
    for name, weight in weights(both.folder(8)).items():
        assert torch.allclose(weight, weights(one.folder(8))[name], atol=1e-9), name
