"""Knocking out, amplifying and steering do what their definitions say: against hooks written out by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.act import Action, Goal, amplify, knock_out, prompt, steer
from headwater.act.ablation import _others
from headwater.act.action import column_of
from headwater.act.measuring import main_metric, score
from headwater.behavior.metrics import metric
from headwater.behavior.table import Behavior
from headwater.core.errors import HeadwaterError, MethodError, SiteError
from headwater.core.sites import Site

IDS = torch.tensor([[5, 17, 40, 8, 99, 3], [7, 300, 41, 2, 65, 4]])


@pytest.fixture(scope="module")
def ioi() -> Behavior:
    return hw.behavior("ioi", n=48, seed=0)


@contextmanager
def by_hand(hf: Any, heads: dict[tuple[int, int], Any], mlps: dict[int, Any]) -> Iterator[None]:
    """Plain hooks on a Llama: a head's slice of what the output projection reads, an MLP's output; from token 1 on."""
    width = hf.config.head_dim
    handles = []
    for (layer, head), change in heads.items():

        def before(_: Any, args: Any, head: int = head, change: Any = change) -> Any:
            x = args[0].clone()
            part = slice(head * width, (head + 1) * width)
            x[:, 1:, part] = change(x[:, 1:, part])
            return (x, *args[1:])

        handles.append(hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(before))
    for layer, change in mlps.items():

        def after(_: Any, args: Any, out: Any, change: Any = change) -> Any:
            out = out.clone()
            out[:, 1:] = change(out[:, 1:])
            return out

        handles.append(hf.model.layers[layer].mlp.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(hf: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return hf(ids).logits


def means(model: Any, behavior: Behavior, which: str) -> tuple[dict[tuple[int, int], Any], dict[int, Any]]:
    """Mean z of each head and mean MLP output over training pairs and tokens 1 and later, by hooks of their own."""
    seen: dict[Any, list[torch.Tensor]] = {}
    handles = []
    for layer, block in enumerate(model.hf.model.layers):
        handles.append(
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, layer=layer: seen.setdefault(("z", layer), []).append(args[0][:, 1:].flatten(0, 1))
            )
        )
        handles.append(
            block.mlp.register_forward_hook(
                lambda _, args, out, layer=layer: seen.setdefault(("m", layer), []).append(out[:, 1:].flatten(0, 1))
            )
        )
    for group in behavior.train.bind(model).groups:
        logits(model.hf, getattr(group, which))
    for handle in handles:
        handle.remove()
    width, n = model.d_head, model.n_heads
    z = {layer: torch.cat(seen["z", layer]).mean(0) for layer in range(model.n_layers)}
    heads = {(layer, h): z[layer][h * width : (h + 1) * width] for layer in z for h in range(n)}
    return heads, {layer: torch.cat(seen["m", layer]).mean(0) for layer in z}


# Knocking out -------------------------------------------------------------------------------------------------------


def test_zero_knock_out_is_zero_at_every_token_but_the_first(tiny_model64: Any) -> None:
    action = knock_out(tiny_model64, ["a0.h1", "head.2.h3", "m1"], how="zero")
    with by_hand(tiny_model64.hf, {(0, 1): torch.zeros_like, (2, 3): torch.zeros_like}, {1: torch.zeros_like}):
        wanted = logits(tiny_model64.hf)
    found = tiny_model64.run(IDS, interventions=action.interventions).logits
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.equal(found[:, 0], logits(tiny_model64.hf)[:, 0])
    assert not torch.allclose(found, logits(tiny_model64.hf), atol=1e-3)
    assert action.goal == Goal(direction="lower")
    assert action.values == 2 * tiny_model64.d_head + tiny_model64.d_model


@pytest.mark.parametrize(("over", "which"), [("counterfactual", "corrupt"), ("train", "clean")])
def test_mean_knock_out_takes_the_mean_of_the_training_pairs(
    tiny_model64: Any, ioi: Behavior, over: Any, which: str
) -> None:
    heads, mlps = means(tiny_model64, ioi, which)
    action = knock_out(tiny_model64, ["a1.h0", "a1.h2", "m2"], ioi, over=over)
    changes = {at: (lambda x, at=at: heads[at].expand_as(x)) for at in ((1, 0), (1, 2))}
    with by_hand(tiny_model64.hf, changes, {2: lambda x: mlps[2].expand_as(x)}):
        wanted = logits(tiny_model64.hf)
    assert torch.allclose(tiny_model64.run(IDS, interventions=[*action]).logits, wanted, atol=1e-10)
    assert action.passes == ioi.train.bind(tiny_model64).n


def test_a_head_is_the_same_at_z_and_at_its_write(tiny_gpt2_model64: Any, ioi: Behavior) -> None:
    model = tiny_gpt2_model64
    action = knock_out(model, "a1.h2", ioi)
    total, n = 0.0, 0
    for group in ioi.train.bind(model).groups:
        write = model.run(group.corrupt, capture=["head.1.h2"], logits="none")["head.1.h2"][:, 1:]
        total, n = total + write.sum((0, 1)), n + write.shape[0] * write.shape[1]
    edit = hw.mean("head.1.h2", torch.as_tensor(total / n), positions=slice(1, None))
    wanted = model.run(IDS, interventions=[edit]).logits
    assert torch.allclose(model.run(IDS, interventions=[*action]).logits, wanted, atol=1e-10)


def test_patterns_name_many_nodes(tiny_model64: Any) -> None:
    assert len(knock_out(tiny_model64, "head.1.h*", how="zero")) == tiny_model64.n_heads
    assert len(knock_out(tiny_model64, ["mlp_out.*", "m1"], how="zero")) == tiny_model64.n_layers
    assert knock_out(tiny_model64, [f"a0.h{h}" for h in range(4)] + ["m0", "m1"], how="zero").name.endswith("2 more")


def test_the_same_edit_holds_while_generating(tiny_model64: Any) -> None:
    action = knock_out(tiny_model64, ["a1.h0", "m2"], how="zero")
    prompt_ids = IDS[0].tolist()
    ids = list(prompt_ids)
    for _ in range(6):  # no cache: every step runs the whole text
        ids.append(int(tiny_model64.run([ids], logits="last", interventions=[*action]).logits.argmax()))
    wanted = tiny_model64.tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True)
    made = tiny_model64.generate([prompt_ids], max_new_tokens=6, interventions=[*action], eos_token_id=None)
    assert made[0] == wanted
    with tiny_model64.intervene(*action):
        assert tiny_model64.generate([prompt_ids], max_new_tokens=6, eos_token_id=None)[0] == wanted


def test_the_random_version_has_the_same_profile(tiny_model64: Any) -> None:
    chosen = ["a0.h1", "a2.h0", "a2.h3", "m1"]
    action = knock_out(tiny_model64, chosen, how="zero")
    assert action.control is not None
    draws = [action.control(seed) for seed in range(8)]
    for draw in draws:
        nodes = draw.config["nodes"]
        assert sorted(node.split(".")[0] for node in nodes if node[0] == "a") == ["a0", "a2", "a2"]
        assert not set(nodes) & set(chosen)
        assert sum(node[0] == "m" for node in nodes) == 1
    assert len({tuple(draw.config["nodes"]) for draw in draws}) > 2
    assert action.control(3).config == action.control(3).config
    every = [Site("z", 1, h) for h in range(4)]
    assert _others(tiny_model64, every, 0) == every  # no others are left in that layer


# Amplifying ---------------------------------------------------------------------------------------------------------


def test_amplify_moves_away_from_the_mean(tiny_model64: Any, ioi: Behavior) -> None:
    heads, mlps = means(tiny_model64, ioi, "corrupt")
    action = amplify(tiny_model64, ["a1.h0", "m2"], ioi, factor=3.0)
    mean, other = heads[1, 0], mlps[2]
    with by_hand(tiny_model64.hf, {(1, 0): lambda x: mean + 3 * (x - mean)}, {2: lambda x: other + 3 * (x - other)}):
        wanted = logits(tiny_model64.hf)
    assert torch.allclose(tiny_model64.run(IDS, interventions=[*action]).logits, wanted, atol=1e-10)
    assert action.goal == Goal(direction="raise")


def test_amplify_by_one_zero_and_without_a_mean(tiny_model64: Any, ioi: Behavior) -> None:
    def under(action: Action) -> torch.Tensor:
        return tiny_model64.run(IDS, interventions=[*action]).logits

    plain = logits(tiny_model64.hf)
    assert torch.allclose(under(amplify(tiny_model64, "a1.h0", ioi, factor=1.0)), plain, atol=1e-12)
    none = under(amplify(tiny_model64, "a1.h0", ioi, factor=0.0))
    assert torch.allclose(none, under(knock_out(tiny_model64, "a1.h0", ioi)), atol=1e-12)
    heads, _ = means(tiny_model64, ioi, "corrupt")
    with by_hand(tiny_model64.hf, {(1, 0): lambda x: heads[1, 0].expand_as(x)}, {}):
        assert torch.allclose(none, logits(tiny_model64.hf), atol=1e-10)
    assert not torch.allclose(none, plain, atol=1e-3)
    with by_hand(tiny_model64.hf, {(1, 0): lambda x: 2 * x}, {}):
        wanted = logits(tiny_model64.hf)
    assert torch.allclose(under(amplify(tiny_model64, "a1.h0")), wanted, atol=1e-12)


# Steering -----------------------------------------------------------------------------------------------------------


def difference(model: Any, behavior: Behavior, layer: int, signs: dict[str, float]) -> torch.Tensor:
    """The mean signed difference at the last token, from transformers' own hidden states."""
    bound = behavior.bind(model)
    ids = behavior.frame["id"].to_list()
    total = []
    for group in bound.groups:
        with torch.inference_mode():
            states = [model.hf(x, output_hidden_states=True).hidden_states for x in (group.clean, group.corrupt)]
        change = states[0][layer + 1][:, -1] - states[1][layer + 1][:, -1]
        total.append(change * torch.tensor([signs[ids[row]] for row in group.rows])[:, None])
    return torch.cat(total).mean(0)


def parts(behavior: Behavior, action: Action, n: int, seed: int) -> tuple[Behavior, Behavior]:
    """The split that `steer` makes of the training pairs, written out."""
    order = np.random.default_rng(seed).permutation(behavior.train.n)
    held = min(n, behavior.train.n // 3)
    return behavior.train[sorted(order[held:].tolist())], behavior.train[sorted(order[:held].tolist())]


def test_the_vector_is_the_difference_of_means_and_the_best_on_held_out_pairs(tiny_model64: Any, ioi: Behavior) -> None:
    action = steer(
        tiny_model64, ioi, ["resid_post.0", "resid_post.1"], goal="order=ABBA", n=8, seed=3, max_perplexity=1e9
    )
    fit, held = parts(ioi, action, 8, 3)
    signs = {id: 1.0 if order == "ABBA" else -1.0 for id, order in ioi.frame.select("id", "order").iter_rows()}
    sweep = action.sweep
    assert sweep is not None
    assert set(sweep["site"]) == {"resid_post.0", "resid_post.1"}
    for row in sweep.iter_rows(named=True):
        vector = difference(tiny_model64, fit, int(row["site"][-1]), signs)
        assert row["norm"] == pytest.approx(row["strength"] * float(vector.norm()), rel=1e-6)
        edit = hw.add(row["site"], vector, scale=row["strength"], positions=slice(-1, None))
        values = []
        for group in held.bind(tiny_model64).groups:
            run = tiny_model64.run(group.clean, logits="last", interventions=[edit])
            ids = [held.frame["id"][r] for r in group.rows]
            some = metric("logit_diff")(run.logits, group.answers, group.foils)
            values += [signs[id] * value for id, value in zip(ids, some.tolist(), strict=True)]
        assert row["after"] == pytest.approx(np.mean(values), abs=1e-6)
    best = sweep.sort(sweep["after"] - sweep["before"], descending=True).row(0, named=True)
    assert best["chosen"]
    assert (action.config["site"], action.config["strength"]) == (best["site"], best["strength"])
    (edit,) = action
    assert torch.allclose(edit.value, difference(tiny_model64, fit, int(best["site"][-1]), signs), atol=1e-8)


def test_the_goal_is_found_where_none_is_given(tiny_model64: Any, ioi: Behavior) -> None:
    found = steer(tiny_model64, ioi, "resid_post.1", strengths=(1.0, 2.0), n=6, max_perplexity=1e9)
    assert found.sweep is not None
    assert set(found.sweep["goal"]) == {"raise", "order = ABBA"}
    gains = found.sweep["after"] - found.sweep["before"]
    assert found.sweep.row(int(gains.arg_max() or 0), named=True)["goal"] == str(found.goal)
    assert "" not in found.config.values()


def test_lower_is_raise_turned_round(tiny_model64: Any) -> None:
    behavior = hw.behavior("greater_than", n=30, seed=0)
    options: dict[str, Any] = {"strengths": (1.0,), "max_perplexity": 1e9}
    up = steer(tiny_model64, behavior, "resid_post.1", goal="raise", **options)
    down = steer(tiny_model64, behavior, "resid_post.1", goal="lower", **options)
    assert torch.equal(up.interventions[0].value, -down.interventions[0].value)


def test_a_vector_that_wrecks_plain_text_is_passed_over(tiny_model64: Any, ioi: Behavior) -> None:
    options: dict[str, Any] = {"goal": "order=ABBA", "n": 6, "strengths": (0.5, 1.0, 8.0)}
    none_passes = steer(tiny_model64, ioi, "resid_post.*", max_perplexity=0.0, **options)
    sweep = none_passes.sweep
    assert sweep is not None
    assert sweep["perplexity_ratio"].null_count() == 0  # every one was looked at
    assert sweep.filter("chosen")["perplexity_ratio"].item() == sweep["perplexity_ratio"].min()
    limit = float(sweep["perplexity_ratio"].median() or 0)  # type: ignore[arg-type]
    action = steer(tiny_model64, ioi, "resid_post.*", max_perplexity=limit, **options)
    passing = sweep.filter(sweep["perplexity_ratio"] <= limit)
    assert action.config["validation"]["after"] == pytest.approx(passing["after"].max())


def test_the_random_direction_has_the_same_length(tiny_model64: Any, ioi: Behavior) -> None:
    action = steer(tiny_model64, ioi, "resid_post.1", goal="raise", n=6)
    assert action.control is not None
    one, two = action.control(0), action.control(1)
    mine, first, second = action.interventions[0], one.interventions[0], two.interventions[0]
    assert float(first.value.norm()) == pytest.approx(float(mine.value.norm()))
    assert (first.site, first.scale, first.positions) == (mine.site, mine.scale, mine.positions)
    assert not torch.allclose(first.value, second.value)


# Prompting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", ["raise", "lower", "order=BABA"])
def test_the_prefix_is_the_best_on_training_pairs(tiny_model64: Any, ioi: Behavior, goal: str) -> None:
    found = prompt(tiny_model64, ioi, goal, n=6, shots=(1, 2))
    assert found.sweep is not None
    assert found.prefix == found.sweep["prefix"][int(found.sweep["score"].arg_max() or 0)]
    wanted = Goal.parse(goal)
    judged = ioi.train[:6].bind(tiny_model64)
    under = score(tiny_model64, judged, found, ["logit_diff"])
    by_id = {row["id"]: row for row in judged.frame.to_dicts()}
    for id, value in under.iter_rows():  # the prefix and the prompt are tokenized together
        row = by_id[id]
        ids = tiny_model64.tokenizer(found.prefix + row["prompt"]).input_ids
        out = tiny_model64.run([ids], logits="last").logits[0]
        answer, foil = (tiny_model64.tokenizer(row[name][0]).input_ids[0] for name in ("answers", "foils"))
        assert value == pytest.approx(float(out[answer] - out[foil]), abs=1e-8)
    shots = [prefix for prefix in found.sweep["prefix"].to_list() if prefix.endswith(".\n")]
    assert shots
    lines = {row["prompt"]: row for row in ioi.train.frame.to_dicts()}
    for line in "".join(shots).splitlines():
        start = next(text for text in lines if line.startswith(text))
        ends = lines[start]["foils" if goal == "lower" else "answers"]
        assert line == f"{start}{ends[0]}."
        assert wanted.direction != "toward" or lines[start]["order"] == "BABA"


# Goals and mistakes -------------------------------------------------------------------------------------------------


def test_goals(ioi: Behavior) -> None:
    goal = Goal.parse("order = ABBA")
    assert str(goal) == "order = ABBA"
    signs = goal.signs(ioi.frame)
    assert set(signs) == {1.0, -1.0}
    assert [s > 0 for s in signs] == [order == "ABBA" for order in ioi.frame["order"]]
    assert set(Goal.parse("lower").signs(ioi.frame)) == {-1.0}
    assert column_of(hw.behavior("agreement", n=8).frame, "plural")[0] in ("true", "false")
    assert main_metric(ioi) == "logit_diff"


def mistakes(model: Any, ioi: Behavior) -> dict[str, tuple[Any, str]]:
    return {
        "no nodes": (lambda: knock_out(model, [], ioi), "no nodes to act on"),
        "no mean": (lambda: knock_out(model, "a0.h1"), "mean is taken over the pairs of a behavior"),
        "how": (lambda: knock_out(model, "a0.h1", how="maybe"), "mean or zero"),  # type: ignore[arg-type]
        "over": (lambda: knock_out(model, "a0.h1", ioi, over="test"), "counterfactual or train"),  # type: ignore[arg-type]
        "kind": (lambda: knock_out(model, "resid_post.1", ioi), "cannot be knocked out"),
        "logits": (lambda: amplify(model, "logits", ioi), "cannot be knocked out or amplified"),
        "position": (lambda: knock_out(model, "m1@-1", ioi), "whole nodes"),
        "goal": (lambda: knock_out(model, "m1", ioi, goal="up"), "cannot read a goal"),
        "column": (lambda: steer(model, ioi, goal="ordr=ABBA"), "unknown column.*order"),
        "value": (lambda: steer(model, ioi, goal="order=AABB"), "no pair has order.*ABBA"),
        "pairs": (lambda: steer(model, ioi[[0, 1, 2, 3]]), "too few training pairs"),
        "site": (lambda: steer(model, ioi, "resid_post.1@-1"), "cannot steer there"),
    }


@pytest.mark.parametrize("which", list(mistakes(None, None)))  # type: ignore[arg-type]
def test_mistakes_are_named(tiny_model64: Any, ioi: Behavior, which: str) -> None:
    wrong, said = mistakes(tiny_model64, ioi)[which]
    with pytest.raises(MethodError, match=said):
        wrong()


def test_nodes_that_the_model_lacks(tiny_model64: Any, ioi: Behavior) -> None:
    for node in ("a0.h9", "m7", "a9.h0"):
        with pytest.raises(SiteError):
            knock_out(tiny_model64, node, ioi)
    with pytest.raises(HeadwaterError):
        steer(tiny_model64, ioi, "resid_post.9")
