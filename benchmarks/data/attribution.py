"""Attribution to examples on planted facts, and its causal test: `python -m benchmarks.data.attribution [FOLDER]`.

24 facts, each stated in 13 of 1,500 sequences (base rate .009), with 3 lures each; a Llama of two layers (d 64) is
trained 400 steps on them, two sets of data. Every method's precision at 10 beside base rate and co-occurrence
retrieval; then, on the first set, what each ranking's first ten are worth: training again without them, two seeds.
FOLDER keeps the runs; killed, the same command goes on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from headwater.data import AttributionToData, Corpus
from headwater.data.attribution.attributing import attribute
from headwater.data.attribution.planted import planted
from headwater.data.attribution.removing import remove_and_retrain
from headwater.dynamics import TrainConfig, train

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cosine", {}), ("tracin", {}), ("tracin", {"normalize": True}), ("trak", {}), ("ekfac", {}),
)  # fmt: skip
SETS, STEPS = (0, 1), 400


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        removed: list[Any] = []
        for seed in SETS:
            data = planted(seed=seed)
            file = folder / f"rows-{seed}.npy"
            if not file.exists():
                np.save(file, data.rows)
            config = TrainConfig.from_dict({
                "model": {"type": "llama", "d_model": 64, "n_layers": 2, "n_heads": 4},
                "data": [{"source": str(file)}], "vocabulary": len(data.words), "steps": STEPS, "batch": 32,
                "optimizer": {"lr": 2e-3}, "schedule": {"warmup": 20}, "threads": 1, "seed": seed,
                "checkpoints": {"log": False, "at": [133, 267]},
            })  # fmt: skip
            run = train(config, folder / f"run-{seed}")
            for method, options in METHODS:
                name = method + ("".join(f", {key}" for key in options))
                kept = folder / "found" / f"{seed}-{name.replace(', ', '-')}"
                if not (kept / "result.json").exists():
                    attribute(run, data.queries, Corpus.open(file), truth=data.truth, method=method, **options).save(
                        kept
                    )
                found = AttributionToData.load(kept)
                seconds = found.provenance.seconds
                for row in found.tables["summary"].filter(pl.col("of") == "relevant").iter_rows(named=True):
                    ranking = name if row["ranking"] == method else row["ranking"]
                    rows.append({"set": seed, "ranking": ranking, "precision": row["precision"], "seconds": seconds})
                loss = found.tables["queries"]["loss"].mean()
                print(f"set {seed}, {name}: loss of the facts {loss:.3f}; {found.text}", flush=True)
                if seed == SETS[0] and method in ("cosine", "tracin", "ekfac") and not options:
                    removed.append(found)
        table = pl.DataFrame(rows).group_by("ranking", maintain_order=True).agg(
            pl.col("precision").mean().alias("mean"), pl.col("precision").min().alias("least"),
            pl.col("precision").max().alias("most"), pl.col("seconds").median(),
        )  # fmt: skip
        with pl.Config(tbl_rows=50, tbl_cols=20, tbl_width_chars=200):
            print(table)
            made = remove_and_retrain(
                folder / "run-0", planted(seed=0).queries, removed, folder / "without", source=0, seeds=(0, 1)
            )  # fmt: skip
            print(made.tables["effect"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
