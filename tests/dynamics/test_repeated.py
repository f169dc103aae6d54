"""Repeated data: what is trained, what is measured, and what counts as a bump."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from headwater.core.errors import HeadwaterError
from headwater.core.results import load_result
from headwater.dynamics import TrainConfig, TrainingRun
from headwater.dynamics.repeated import RepeatedData, bumps, repeated
from lab_runs import small

OPTIONS = {"vocabulary": 12, "length": 12, "sequences": 500}


def config() -> TrainConfig:
    return small(
        data=[{"source": "induction", "options": OPTIONS}], steps=25, batch=8, model={"d_model": 16, "n_heads": 2},
        validation=[{"source": "induction", "options": {**OPTIONS, "seed": 9}, "sequences": 16}], validate_every=25,
        checkpoints={"log": False},
    )  # fmt: skip


def test_each_share_is_trained_and_measured(tmp_path: Path) -> None:
    found = repeated(config(), tmp_path / "out", shares=(0.5,), sequences=(2, 20), seeds=(0, 1))
    runs = found.tables["runs"]
    assert set(runs["measure"].to_list()) == {
        "validation loss", "validation accuracy", "repeated loss", "induction", "previous token",
    }  # fmt: skip
    one = TrainingRun.open(tmp_path / "out" / "share-0.5-of-2-seed-1")
    numbers = np.arange(200)
    which = one.data.order.at(numbers)[1]
    names, counts = np.unique(which, return_counts=True)
    often = names[counts > 20]
    assert len(often) == 2
    row = runs.filter((pl.col("sequences") == 2) & (pl.col("seed") == 1) & (pl.col("measure") == "repeated loss"))
    assert row["repeats"][0] == counts[counts > 20].sum() / 2
    ids = torch.from_numpy(one.data.sources[0].batch(often))
    logits = one.load().hf(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert row["value"][0] == pytest.approx(loss, rel=1e-5)
    points = found.tables["points"].filter((pl.col("sequences") == 20) & (pl.col("measure") == "validation loss"))
    mine = runs.filter((pl.col("sequences") == 20) & (pl.col("measure") == "validation loss"))["value"]
    assert points["value"][0] == pytest.approx(mine.mean()) and points["n"][0] == 2
    assert (points["lo"][0], points["hi"][0]) == (mine.min(), mine.max())
    plain = found.tables["points"].filter(pl.col("share") == 0)
    assert plain["repeats"].to_list() == [0.0] * 4 and "repeated loss" not in plain["measure"].to_list()
    again = repeated(config(), tmp_path / "out", shares=(0.5,), sequences=(2, 20), seeds=(0, 1))
    assert again.content_hash == found.content_hash
    kept = load_result(found.save(tmp_path / "kept"))
    assert isinstance(kept, RepeatedData) and kept.facts["worst"] == found.facts["worst"]


def points(values: dict[float, tuple[float, float, float]]) -> pl.DataFrame:
    rows = [(0.5, 1, repeats, "fresh loss", *value, 3) for repeats, value in values.items()]
    names = ("share", "sequences", "repeats", "measure", "value", "lo", "hi", "n")
    return pl.DataFrame([(0.0, 0, 0.0, "fresh loss", 1.0, 0.9, 1.1, 3), *rows], schema=names, orient="row")


def test_a_bump_lies_between_the_ends_and_beyond_every_seed() -> None:
    (found,) = bumps(points({2: (1.2, 1.1, 1.3), 50: (2.0, 1.8, 2.2), 900: (1.5, 1.4, 1.7)}))
    assert found["bump"] and found["repeats"] == 50 and found["without"] == 1.0
    assert found["above_fewer"] == pytest.approx(0.8) and found["above_more"] == pytest.approx(0.5)
    (within,) = bumps(points({2: (1.2, 1.1, 1.3), 50: (2.0, 1.6, 2.2), 900: (1.5, 1.4, 1.7)}))
    assert not within["bump"]
    (rising,) = bumps(points({2: (1.2, 1.1, 1.3), 50: (1.5, 1.4, 1.6), 900: (2.5, 2.4, 2.7)}))
    (single,) = bumps(points({2: (1.2, 1.2, 1.2), 50: (2.0, 2.0, 2.0), 900: (1.5, 1.5, 1.5)}).with_columns(n=1))
    assert single["bump"] is None
    assert not rising["bump"] and rising["above_more"] is None and rising["repeats"] == 900


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(HeadwaterError, match="fresh data"):
        repeated(small(validation=[]), tmp_path)
    with pytest.raises(HeadwaterError, match="fresh data"):
        repeated(config(), tmp_path, source=3)
    for grid in ({"sequences": (0, 8)}, {"shares": (0.0, 0.5)}):  # these would be trained without any repeats
        with pytest.raises(HeadwaterError, match="share"):
            repeated(config(), tmp_path, **grid)
    with pytest.raises(HeadwaterError, match="nothing to train"):
        repeated(config(), tmp_path, seeds=())
