"""Spurious cues: groups where a model fails, weights of groups, barriers half-way; on tiny models."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import headwater as hw
from headwater.act.catalog import act
from headwater.act.measuring import NOTHING, score
from headwater.act.training.connectivity import half_way
from headwater.act.training.cues import clusters, cue_groups, group_weights
from headwater.act.training.fitting import twin_of
from headwater.core.errors import MethodError


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=64, seed=0)


def test_groups_are_judged_on_test_pairs(tiny_model: Any, ioi: Any) -> None:
    found = cue_groups(tiny_model, ioi, draws=99)
    table, bound = found.to_frame(), ioi.test.bind(tiny_model)
    for source in set(table["source"]):
        assert table.filter(source=source)["n"].sum() == bound.n
    right = score(tiny_model, bound, NOTHING, ["accuracy"])["accuracy"]
    assert found.facts["accuracy"] == pytest.approx(right.mean())
    by_hand = (
        bound.frame.select("id", "order").join(score(tiny_model, bound, NOTHING, ["accuracy"]), on="id")
        .group_by("order").agg(pl.col("accuracy").mean()).sort("order")["accuracy"].to_list()
    )  # fmt: skip
    assert table.filter(source="order").sort("group")["accuracy"].to_list() == pytest.approx(by_hand)
    assert found.chart() is not None


def test_clusters_find_blobs() -> None:
    random = np.random.default_rng(0)
    blobs = np.concatenate([random.normal(size=(20, 12)) + 12 * np.eye(12)[i] for i in range(3)])
    labels = clusters(blobs, 3, seed=0).assign(blobs)
    assert [len(set(labels[i : i + 20])) for i in (0, 20, 40)] == [1, 1, 1]
    assert len(set(labels)) == 3
    with pytest.raises(MethodError, match="clusters do not fit"):
        clusters(blobs[:2], 3, seed=0)


def test_each_group_counts_alike() -> None:
    labels, right = ["a"] * 6 + ["b"] * 2, np.array([1.0] * 6 + [0.0, 1.0])
    size = group_weights(labels, right, "size")
    assert size[:6].sum() == pytest.approx(size[6:].sum())
    assert size.mean() == pytest.approx(1.0)
    errors = group_weights(labels, right, "errors")
    assert errors[6:].sum() > 100 * errors[:6].sum()


def test_reweighted_training_learns_the_answers_and_is_undone(tiny_model: Any, ioi: Any) -> None:
    before = {name: weight.clone() for name, weight in tiny_model.hf.state_dict().items()}
    for by in ("order", "clusters"):
        made = act("reweighted", tiny_model, ioi, by=by, steps=6, lr=3e-3, batch=16)
        bound = ioi.train.bind(tiny_model)
        was, now = (score(tiny_model, bound, one, ["prob_diff"])["prob_diff"].mean() for one in (NOTHING, made))
        assert isinstance(was, float) and isinstance(now, float) and now > was
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_model.hf.state_dict().items())


def test_half_way_is_the_mean_of_the_weights(tiny_model64: Any) -> None:
    hf = tiny_model64.hf
    name = "model.layers.1.mlp.down_proj.weight"
    twin = twin_of(hf, [name])
    old = dict(hf.named_parameters())[name].detach()
    with torch.no_grad():
        dict(twin.named_parameters())[name].add_(0.3)
    ids = torch.tensor([[5, 17, 40, 8]])
    found = half_way(twin, {name: old})(input_ids=ids, use_cache=False).logits
    found.sum().backward()
    gradient = dict(twin.named_parameters())[name].grad
    assert gradient is not None and float(gradient.abs().max()) > 0
    by_hand = twin_of(hf, [name])
    with torch.no_grad():
        dict(by_hand.named_parameters())[name].add_(0.15)
    torch.testing.assert_close(found, by_hand(input_ids=ids, use_cache=False).logits, rtol=1e-9, atol=1e-10)


def test_cbft_raises_a_barrier_that_fine_tuning_does_not(tiny_model: Any, ioi: Any) -> None:
    model, same = tiny_model, {"steps": 12, "lr": 3e-3, "batch": 16, "cue": "order=ABBA"}

    def half_loss(barrier: float, level: float) -> float:
        made = act("cbft", model, ioi, barrier=barrier, level=level, **same)
        assert made.edit is not None
        bound = ioi.train.bind(model)
        rows = bound.frame.filter(order="ABBA")["id"].to_list()
        half = hw.act.Action(name="half", edit=made.edit.scaled(0.5))
        found = score(model, bound, half, ["prob"]).filter(pl.col("id").is_in(rows))["prob"].to_numpy()
        return float(-np.log(found).mean())

    assert half_loss(20.0, 30.0) > half_loss(0.0, 30.0) + 0.5
    with pytest.raises(MethodError, match="the cue is not named"):
        act("cbft", model, ioi, steps=1)
