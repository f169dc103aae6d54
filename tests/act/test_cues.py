"""Spurious cues: groups where a model fails, weights of groups, barriers half-way; on tiny models."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import headwater as hw
from headwater.act.action import Goal
from headwater.act.catalog import act
from headwater.act.measuring import NOTHING, score
from headwater.act.training.connectivity import Breaking, ConnectivityConfig, half_way, invariance
from headwater.act.training.cues import ReweightedConfig, _Weighted, clusters, cue_groups, group_weights
from headwater.act.training.examples import batches, draws, mean_loss, wanted
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


def test_training_ends_when_every_group_is_learned_not_most(tiny_model: Any, ioi: Any) -> None:
    some = wanted(tiny_model, ioi, Goal())[:8]
    labels = ["many"] * 6 + ["few"] * 2
    losses = dict(_losses(tiny_model, some))
    objective = _Weighted(some, np.ones(8), labels, ReweightedConfig(batch=8), tiny_model)
    told = sum(said or 0.0 for _, said in objective(tiny_model.hf, 0))
    by_hand = {name: np.mean([losses[at] for at in range(8) if labels[at] == name]) for name in labels}
    assert told == pytest.approx(max(by_hand.values()), rel=1e-5)
    # a batch of one: the group that it does not hold is as it was met before, at chance at first
    objective = _Weighted(some, np.ones(8), labels, ReweightedConfig(batch=1), tiny_model)
    before = dict.fromkeys(labels, float(np.log(tiny_model.d_vocab)))
    for step, (number,) in zip(range(8), draws(8, 1, 0), strict=False):
        told = sum(said or 0.0 for _, said in objective(tiny_model.hf, step))
        before[labels[number]] = losses[number]
        assert told == pytest.approx(max(before.values()), rel=1e-5)


def _losses(model: Any, some: Any) -> list[tuple[int, float]]:
    with torch.no_grad():
        return [
            (number, float(loss))
            for numbers, ids_BT, there_BT in batches(some, list(range(len(some))), "cpu")
            for number, loss in zip(numbers, mean_loss(model.hf, ids_BT, there_BT), strict=True)
        ]


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


def test_invariance_is_the_distance_between_an_answers_mean_directions() -> None:
    random = np.random.default_rng(0)
    rest, shown = random.normal(size=(7, 5)), random.normal(size=(6, 5))
    of_rest, of_shown = [1, 1, 2, 2, 2, 3, 9], [1, 2, 2, 1, 4, 1]
    wanted = []
    for answer in (1, 2):  # only these are on both sides
        means = [np.mean([x for x, label in zip(side, labels, strict=True) if label == answer], axis=0)
                 for side, labels in ((rest, of_rest), (shown, of_shown))]  # fmt: skip
        one, other = (mean / np.linalg.norm(mean) for mean in means)
        wanted.append(np.sum((one - other) ** 2))
    found = invariance(torch.tensor(rest), of_rest, torch.tensor(shown), of_shown)
    assert float(found) == pytest.approx(np.mean(wanted))
    assert float(invariance(torch.tensor(rest), of_rest, torch.tensor(rest), of_rest)) == 0.0
    assert float(invariance(torch.tensor(rest), of_rest, torch.tensor(shown), [7] * 6)) == 0.0


@pytest.mark.parametrize("name", ["tiny_model64", "tiny_gpt2_model64"])
def test_a_step_of_cbft_is_its_three_losses(name: str, request: pytest.FixtureRequest) -> None:
    model, agreement = request.getfixturevalue(name), hw.behavior("agreement", n=40, seed=0)
    frame = agreement.train.bind(model).frame
    column = next(one for one in agreement.slices if frame[one].n_unique() == 2)
    signs = Goal.parse(f"{column}={frame[column][0]}").signs(frame)
    some = wanted(model, agreement, Goal())
    shown = [one for one, sign in zip(some, signs, strict=True) if sign > 0][:5]
    rest = [one for one, sign in zip(some, signs, strict=True) if sign < 0][:5]
    used = ConnectivityConfig(cue="x=y", level=0.7, barrier=3.0, invariance=2.0, batch=8)
    names = ["model.layers.1.mlp.down_proj.weight"] if name == "tiny_model64" else ["transformer.h.1.mlp.c_proj.weight"]
    twin = twin_of(model.hf, names)
    before = {one: value.detach().clone() for one, value in twin.named_parameters() if one in names}
    with torch.no_grad():
        for one in names:
            dict(twin.named_parameters())[one].add_(0.1)
    objective = Breaking(rest, shown, before, used, "cpu")
    parts = list(objective(twin, 0))
    assert objective.passes == 3 * 5

    def read(hf: Any, one: Any) -> tuple[torch.Tensor, float]:
        """What is unembedded at the prompt's last token, and the loss of the answer."""
        held: list[torch.Tensor] = []
        hook = hf.lm_head.register_forward_pre_hook(lambda _, args: held.append(args[0]))
        with torch.no_grad():
            said = hf(input_ids=one.ids[None]).logits[0].log_softmax(-1)
        hook.remove()
        learned = range(one.start, len(one.ids))
        return held[0][0, one.start - 1], -float(np.mean([float(said[t - 1, one.ids[t]]) for t in learned]))

    streams = {side: [read(twin, one)[0] for one in side_of] for side, side_of in (("rest", rest), ("shown", shown))}
    labels = {
        side: [int(one.ids[one.start]) for one in side_of] for side, side_of in (("rest", rest), ("shown", shown))
    }
    assert set(labels["rest"]) & set(labels["shown"])
    alike = invariance(torch.stack(streams["rest"]), labels["rest"], torch.stack(streams["shown"]), labels["shown"])
    middle = twin_of(model.hf, names)
    with torch.no_grad():
        for one in names:
            dict(middle.named_parameters())[one].add_(0.05)
    clean = np.mean([read(twin, one)[1] for one in rest])
    barrier = abs(np.mean([read(middle, one)[1] for one in shown]) - 0.7)
    assert sum(float(loss.detach()) for loss, _ in parts) == pytest.approx(
        clean + 2 * float(alike) + 3 * barrier, rel=1e-6
    )
    assert sum(told for _, told in parts if told is not None) == pytest.approx(clean, rel=1e-6)
    sum((loss for loss, _ in parts), torch.zeros(())).backward()
    assert float(dict(twin.named_parameters())[names[0]].grad.abs().max()) > 0  # type: ignore[union-attr]


def test_cbft_makes_streams_with_and_without_the_cue_alike(tiny_model: Any) -> None:
    agreement = hw.behavior("agreement", n=64, seed=0)
    bound = agreement.train.bind(tiny_model)
    column = next(one for one in agreement.slices if bound.frame[one].n_unique() == 2)
    cue = f"{column}={bound.frame[column][0]}"
    signs, some = Goal.parse(cue).signs(bound.frame), wanted(tiny_model, agreement, Goal())

    def apart(weight: float) -> float:
        made = act("cbft", tiny_model, agreement, cue=cue, steps=15, lr=2e-3, batch=32, barrier=0.0, invariance=weight)
        with made.on(tiny_model):
            sides = []
            for sign in (-1, 1):
                own = [one for one, told in zip(some, signs, strict=True) if told == sign]
                streams = [tiny_model.run(one.ids[: one.start][None], capture=["resid_post.2@-1"]) for one in own]
                norm = tiny_model.hf.model.norm
                with torch.no_grad():
                    sides += [torch.cat([norm(run["resid_post.2@-1"]) for run in streams])]
                sides += [[int(one.ids[one.start]) for one in own]]  # type: ignore[list-item]
        return float(invariance(*sides))  # type: ignore[arg-type]

    assert apart(20.0) < 0.5 * apart(0.0)
    rows = bound.frame.to_dicts()
    alone = [{**row, "answers": [" great"] if row[column] == rows[0][column] else [" sad"]} for row in rows]
    with pytest.raises(MethodError, match="share no answer"):
        act("cbft", tiny_model, hw.Behavior.from_rows(alone, name="agreement"), cue=cue, steps=1)


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
