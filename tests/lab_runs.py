"""Small training runs that several tests share."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from headwater.dynamics.lab.config import TrainConfig


def small(**options: Any) -> TrainConfig:
    """Two tiny layers on repeated tokens, twelve steps, with dropout (so that random states matter)."""
    settings: dict[str, Any] = {
        "data": [{"source": "induction", "options": {"vocabulary": 12, "length": 12}}],
        "model": {"d_model": 16, "n_heads": 2, "options": {"resid_pdrop": 0.1}},
        "steps": 12,
        "batch": 4,
        "validation": [{"source": "induction", "options": {"vocabulary": 12, "length": 12, "seed": 5}, "sequences": 8}],
        "validate_every": 5,
        "optimizer": {"lr": 0.01, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": 3},
        "checkpoints": {"every": 5, "save_seconds": 0},
    }
    return TrainConfig.from_dict(settings | options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_files(a: Path, b: Path, steps: list[int]) -> bool:
    """Whether the checkpoints of two runs are the same bytes."""
    names = ("model.safetensors", "config.json", "headwater.json")
    return all((a / f"step-{s}" / n).read_bytes() == (b / f"step-{s}" / n).read_bytes() for s in steps for n in names)
