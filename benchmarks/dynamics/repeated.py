"""Repeated data (Hernandez et al., 2022) at the size of the lab: `python -m benchmarks.dynamics.repeated [FOLDER]`.

A Llama of two layers (d 64) sees 14,400 sequences of 24 random tokens of 24 that repeat, for which it learns induction
heads; of these a half are repeats of 8 to 2,048 sequences. Three seeds, 12 runs of about 10 s on one
core. FOLDER keeps them; killed, the same command goes on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import polars as pl

from headwater.dynamics import TrainConfig
from headwater.dynamics.repeated import repeated

SHARES, SEQUENCES, SEEDS = (0.5,), (8, 128, 2048), (0, 1, 2)


def main() -> int:
    options = {"vocabulary": 24, "length": 24, "sequences": 200_000}
    config = TrainConfig.from_dict({
        "model": {"type": "llama", "d_model": 64, "n_layers": 2, "n_heads": 4},
        "data": [{"source": "induction", "options": options}],
        "validation": [{"source": "induction", "name": "fresh", "options": {**options, "seed": 99}, "sequences": 512}],
        "validate_every": 450, "steps": 450, "batch": 32, "optimizer": {"lr": 3e-3}, "schedule": {"warmup": 20},
        "threads": 1, "checkpoints": {"log": False},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        found = repeated(config, folder / "runs", shares=SHARES, sequences=SEQUENCES, seeds=SEEDS)
        if len(sys.argv) > 1:
            found.save(folder / "result")
        table = found.tables["points"].with_columns(
            said=pl.format("{} ({} to {})", *(pl.col(name).round(3) for name in ("value", "lo", "hi")))
        )
        with pl.Config(tbl_rows=50, tbl_cols=20, tbl_width_chars=250, fmt_str_lengths=60):
            print(table.pivot("measure", index=["share", "sequences", "repeats"], values="said"))
        for one in found.facts["worst"]:
            print(one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
