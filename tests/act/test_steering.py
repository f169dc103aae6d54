"""Steering methods against their definitions, also while generating; what is chosen is chosen on training pairs."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import headwater as hw
from headwater.act import steer
from headwater.act.action import Action
from headwater.act.catalog import act, methods
from headwater.act.files import load, save
from headwater.act.measuring import NOTHING, score, text_loss
from headwater.act.steering.choosing import Task
from headwater.act.steering.conditional import Watch, condition
from headwater.act.steering.pca import component
from headwater.act.steering.persona import _ASKED, TRAITS, persona_pairs
from headwater.act.steering.probe import logistic
from headwater.act.steering.turn import Turn
from headwater.act.strengths import curves
from headwater.core.errors import MethodError, StoreError
from headwater.core.sites import Site

STEERING = ["caa", "pca", "probe", "given", "affine", "ablate", "turn", "cast"]
FREE = {"n": 6, "max_perplexity": 1e9}
PROMPT = "When Mary and John went to the garden, John gave a book to"


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=24, seed=0)


def made(method: str, model: Any, behavior: Any, **more: Any) -> Action:
    options = {"direction": torch.arange(32.0)} if method == "given" else {}
    options |= {"apart_from": ("agreement",)} if method == "cast" else {}
    return act(method, model, behavior, **{"sites": "resid_post.1", "goal": "raise", **FREE, **options, **more})


def ends(model: Any, behavior: Any, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[pairs, D] at the last token of prompts and counterfactuals that directions are found on, one at a time."""
    frame = Task.of(model, behavior, site, "raise", 6, 0).fit.frame
    return tuple(  # type: ignore[return-value]
        torch.stack([model.run(text, capture=[site])[site][0, -1].double() for text in frame[column]])
        for column in ("prompt", "counterfactual")
    )


@pytest.mark.parametrize("method", STEERING)
def test_it_acts_while_generating_and_leaves_nothing(tiny_model64: Any, ioi: Any, method: str) -> None:
    action = made(method, tiny_model64, ioi)
    before = tiny_model64.run(PROMPT).logits
    assert action.control is not None and action.at is not None and action.passes > 0 and action.seconds > 0
    assert action.control(0).name != action.name
    strong = action.at(1.0 if method == "ablate" else 3.0)
    ids = tiny_model64.tokens(PROMPT)[0]
    said = tiny_model64.generate(PROMPT, max_new_tokens=4, interventions=strong.interventions)
    # without a cache: each next token from a whole forward, steered from the prompt's end on
    for _ in range(4):
        where = {"end": slice(len(tiny_model64.tokens(PROMPT)[0]) - 1, None), "all": slice(1, None)}
        place = where[str(action.config.get("positions", "end")).replace("-1:", "end")]
        whole = []
        for one in strong.interventions:
            at = slice(len(tiny_model64.tokens(PROMPT)[0]) - 1, len(tiny_model64.tokens(PROMPT)[0]))
            whole.append(type(one)(**{**vars(one), "positions": at if isinstance(one, Watch) else place}))
        logits = tiny_model64.run(ids[None], interventions=whole).logits
        ids = torch.cat([ids, logits[0, -1].argmax()[None]])
    assert tiny_model64.tokenizer.decode(ids[-4:]) == said
    with strong.on(tiny_model64):
        assert not torch.equal(tiny_model64.run(PROMPT).logits, before) or method == "cast"
    assert torch.equal(tiny_model64.run(PROMPT).logits, before)
    assert len(tiny_model64.hf._forward_hooks) == 0


@pytest.mark.parametrize("method", STEERING)
def test_layer_and_strength_are_chosen_on_training_pairs_only(tiny_model64: Any, ioi: Any, method: str) -> None:
    action = made(method, tiny_model64, ioi, sites=("resid_post.0", "resid_post.1"))
    assert action.sweep is not None and action.sweep["chosen"].sum() == 1
    best = action.sweep.with_columns(gain=pl.col("after") - pl.col("before")).sort("gain", descending=True)
    assert best["chosen"][0] and best["strength"][0] == action.config["strength"]
    assert action.config["site"] == best["site"][0]
    # other test pairs: nothing about the choice may move
    fewer = hw.Behavior(
        ioi.frame.filter((pl.col("split") == "train") | (pl.int_range(pl.len()) % 3 == 0)),
        name="ioi",
        metric=ioi.metric,
    )
    again = made(method, tiny_model64, fewer, sites=("resid_post.0", "resid_post.1"))
    assert again.sweep is not None and again.sweep.equals(action.sweep) and again.name == action.name


def test_limits_on_perplexity_hold(tiny_model64: Any, ioi: Any) -> None:
    ratios = {s: made("caa", tiny_model64, ioi, strengths=(s,)).config["perplexity_ratio"] for s in (1.0, 50.0)}
    limit = sum(ratios.values()) / 2
    bound = made("caa", tiny_model64, ioi, strengths=(1.0, 50.0), max_perplexity=limit)
    assert bound.config["strength"] == min(ratios, key=lambda s: ratios[s])
    assert bound.config["perplexity_ratio"] <= limit < max(ratios.values())


def test_a_strength_that_breaks_the_model_is_not_chosen(tiny_model: Any, ioi: Any) -> None:
    options = {**FREE, "max_perplexity": 1e30, "goal": "raise"}
    plain = steer(tiny_model, ioi, "resid_post.1", strengths=(0.5, 2.0), **options)
    for broken in ((0.5, 2.0, 1e39), (1e39, 0.5, 2.0), (0.5, 1e39, 2.0)):
        found = steer(tiny_model, ioi, "resid_post.1", strengths=broken, **options)
        assert found.sweep is not None and found.sweep["after"].is_nan().any()
        assert found.config["strength"] == plain.config["strength"]
    with pytest.raises(MethodError, match="finite"):
        steer(tiny_model, ioi, "resid_post.1", strengths=(1e39,), **options)
    with pytest.raises(MethodError, match="no strength to try"):
        steer(tiny_model, ioi, "resid_post.1", strengths=())


def test_held_pairs_of_one_value_serve_a_goal_of_two(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=12, seed=0)
    for seed in range(8):  # one held pair has one order
        found = steer(tiny_model, ioi, "resid_post.1", goal="order=ABBA", n=1, seed=seed, max_perplexity=1e9)
        assert found.config["validation"]["pairs"] == 1
    with pytest.raises(MethodError, match="no pair has order = 'CCCC'"):
        steer(tiny_model, ioi, "resid_post.1", goal="order=CCCC")


def test_a_model_of_few_words_and_a_short_context_is_steered_too() -> None:
    """As models of the lab are: plain text is not of their words, and is longer than they read."""
    import localize_families
    import tiny as tiny_models

    model = localize_families.make("llama")
    model.tokenizer = tiny_models.word_tokenizer(61)
    rows = [
        {"prompt": f"w3 w{at} w9 w5", "counterfactual": f"w3 w{at + 1} w9 w5", "answer": " w20", "foil": " w21",
         "split": "train" if at < 22 else "test"}
        for at in range(10, 30)
    ]  # fmt: skip
    behavior = hw.Behavior.from_rows(rows, name="made")
    found = act("caa", model, behavior, sites="resid_post.0", goal="raise", n=4, strengths=(0.5, 1.0))
    held = Task.of(model, behavior, "resid_post.0", "raise", 4, 0).held
    texts = held.behavior.prompts
    before, after = (text_loss(model, texts, one).mean() for one in (NOTHING, found))
    assert found.config["perplexity_ratio"] == pytest.approx(np.exp(after - before))
    repaired = act("repair", model, behavior, n=4, max_perplexity=1e9)
    assert repaired.edit is not None and np.isfinite(repaired.config["perplexity_ratio"])


def test_caa_is_steer(tiny_model64: Any, ioi: Any) -> None:
    one = made("caa", tiny_model64, ioi)
    two = steer(tiny_model64, ioi, "resid_post.1", goal="raise", **FREE)
    assert (one.name, one.config) == (two.name, two.config)
    clean, corrupt = ends(tiny_model64, ioi, "resid_post.1")
    assert torch.allclose(one.interventions[0].value, (clean - corrupt).mean(0), atol=1e-10)


def test_lowering_turns_the_vector_round(tiny_model64: Any, ioi: Any) -> None:
    for method in ("caa", "pca", "probe", "given", "turn"):
        up, down = (made(method, tiny_model64, ioi, goal=goal).interventions[0].value for goal in ("raise", "lower"))
        cosine = float(torch.nn.functional.cosine_similarity(up.double(), -down.double(), dim=0))
        assert cosine == pytest.approx(1.0, abs=1e-4), method


@settings(max_examples=20, deadline=None)
@given(n=st.integers(4, 30), width=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_the_component_is_that_of_numpy(n: int, width: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    axis = torch.nn.functional.normalize(torch.randn(width, generator=draw, dtype=torch.float64), dim=0)
    rows = 3 * axis + 0.3 * torch.randn(n, width, generator=draw, dtype=torch.float64)
    vector, share = component(rows)
    mixed = rows.numpy().copy()
    mixed[1::2] *= -1
    values, vectors = np.linalg.eigh(np.cov(mixed.T, bias=True))
    assert abs(float(vector / vector.norm() @ torch.from_numpy(vectors[:, -1]))) == pytest.approx(1.0, abs=1e-8)
    assert share == pytest.approx(values[-1] / values.sum(), abs=1e-9)
    assert float(rows.mean(0) @ (vector / vector.norm())) == pytest.approx(float(vector.norm()))
    assert float(vector @ axis) > 0


def test_the_probe_is_sklearns() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    wanted = torch.randn(30, 5, generator=draw, dtype=torch.float64) + torch.tensor([1.0, 0, 0, -0.5, 0])
    unwanted = torch.randn(30, 5, generator=draw, dtype=torch.float64)
    both = torch.cat([wanted, unwanted])
    x = ((both - both.mean(0)) / both.std(0)).numpy()
    theirs = sklearn.LogisticRegression(C=1 / 0.7, tol=1e-10, max_iter=5000).fit(x, [1] * 30 + [0] * 30).coef_[0]
    mine = (logistic(wanted, unwanted, 0.7) * both.std(0)).numpy()
    assert np.allclose(mine, theirs, atol=1e-4)
    with pytest.raises(MethodError, match="are the same here"):
        logistic(torch.ones(3, 2), torch.ones(3, 2), 1.0)
    with pytest.raises(MethodError, match="penalty above 0"):
        act("probe", None, None, penalty=0.0)


def test_a_given_direction_comes_from_a_file(tiny_model64: Any, ioi: Any, tmp_path: Path) -> None:
    decoder = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "sae.safetensors"
    save_file({"W_dec": decoder, "b": torch.zeros(6)}, file)
    action = act("given", tiny_model64, ioi, sites="resid_post.1", file=str(file), tensor="W_dec", row=4, **FREE)
    value = action.interventions[0].value
    clean, _ = ends(tiny_model64, ioi, "resid_post.1")
    wanted = decoder[4].double() / decoder[4].double().norm() * clean.norm(dim=1).mean()
    assert torch.allclose(value, wanted, atol=1e-9)
    for wrong, said in [
        ({"file": str(file)}, "no such tensor"),
        ({"file": str(file), "tensor": "W_dec"}, "a row of a matrix"),
        ({"file": str(file), "tensor": "W_dec", "row": 6}, "no such row"),
        ({"file": str(file), "tensor": "W_dec", "row": 0, "columns": True}, "does not fit"),
        ({"file": str(tmp_path / "none")}, "cannot read a direction"),
        ({}, "give one direction"),
    ]:
        with pytest.raises(MethodError, match=said):
            act("given", tiny_model64, ioi, sites="resid_post.1", **FREE, **wrong)  # type: ignore[arg-type]


def test_affine_sets_the_component_and_nothing_else(tiny_model64: Any, ioi: Any) -> None:
    action = made("affine", tiny_model64, ioi)
    assert action.at is not None
    clean, corrupt = ends(tiny_model64, ioi, "resid_post.1")
    direction = (clean - corrupt).mean(0)
    unit = direction / direction.norm()
    before = tiny_model64.run(PROMPT, capture=["resid_post.1"])["resid_post.1"][0]
    for strength, level in ((0.0, corrupt.mean(0) @ unit), (1.0, clean.mean(0) @ unit)):
        with action.at(strength).on(tiny_model64):
            after = tiny_model64.run(PROMPT, capture=["resid_post.1"])["resid_post.1"][0]
        assert torch.equal(after[:-1], before[:-1])
        assert float(after[-1] @ unit) == pytest.approx(float(level))
        rest = after[-1] - before[-1]
        assert torch.allclose(rest, (rest @ unit) * unit, atol=1e-9)


def test_ablation_leaves_nothing_along_the_direction(tiny_model64: Any, ioi: Any) -> None:
    action = made("ablate", tiny_model64, ioi)
    clean, corrupt = ends(tiny_model64, ioi, "resid_post.1")
    unit = torch.nn.functional.normalize((clean - corrupt).mean(0), dim=0)
    with action.on(tiny_model64):
        run = tiny_model64.run(PROMPT, capture=["resid_post.*"])
    for layer in range(3):
        assert float((run[f"resid_post.{layer}"][0, 1:] @ unit).abs().max()) < 1e-9


@settings(max_examples=50, deadline=None)
@given(degrees=st.floats(0, 180), seed=st.integers(0, 10**6))
def test_turning_keeps_the_norm_and_the_angle(degrees: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 6, generator=draw, dtype=torch.float64) * 10
    direction = torch.randn(6, generator=draw, dtype=torch.float64)
    after = Turn(site=Site.parse("resid_post.0"), op="add", value=direction, scale=degrees).apply(x)
    assert torch.allclose(after.norm(dim=-1), x.norm(dim=-1), rtol=1e-9)

    def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.rad2deg(torch.acos(torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)))

    apart = angle(x, direction.expand_as(x))
    turned = torch.minimum(apart, torch.tensor(degrees, dtype=torch.float64))
    assert torch.allclose(angle(x, after), turned, atol=1e-4)
    assert torch.allclose(angle(after, direction.expand_as(x)), apart - turned, atol=1e-4)


def test_vectors_on_or_against_the_direction_stay_finite() -> None:
    direction = torch.tensor([1.0, 0.0])
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    after = Turn(site=Site.parse("resid_post.0"), op="add", value=direction, scale=30.0).apply(x)
    assert bool(torch.isfinite(after).all()) and torch.allclose(after[0], x[0])
    assert torch.allclose(after.norm(dim=-1), x.norm(dim=-1))  # there is no plane to turn in: it stays
    assert torch.equal(after[1], x[1])


def test_the_condition_decides_prompt_by_prompt(tiny_model64: Any, ioi: Any) -> None:
    action = made("cast", tiny_model64, ioi, when="order=ABBA", read_at="resid_post.0")
    assert action.at is not None
    strong = action.at(4.0)
    watch, gated = strong.interventions
    assert isinstance(watch, Watch)
    prompts = ioi.test.prompts[:6] + hw.behavior("agreement", n=12, seed=0).test.prompts
    opened = []
    for prompt in prompts:
        stream = tiny_model64.run(prompt, capture=["resid_post.0"])["resid_post.0"][0, -1]
        opened.append(bool(stream @ watch.value > watch.low))
    assert 0 < sum(opened) < len(opened)
    together = tiny_model64.run(prompts, interventions=strong.interventions, logits="last").logits
    for at, prompt in enumerate(prompts):
        plain = tiny_model64.run(prompt, logits="last").logits[0]
        moved = tiny_model64.run(prompt, logits="last", interventions=[
            hw.add("resid_post.1", gated.value, scale=4.0, positions=slice(-1, None))]).logits[0]  # fmt: skip
        assert torch.allclose(together[at], moved if opened[at] else plain, atol=1e-9)
        said = tiny_model64.generate(prompt, max_new_tokens=3, interventions=strong.interventions)
        same = tiny_model64.generate(prompt, max_new_tokens=3, interventions=[
            hw.add("resid_post.1", gated.value, scale=4.0 * opened[at], positions=slice(-1, None))])  # fmt: skip
        assert said == same
    facts = action.config["condition"]
    assert facts["read_at"] == "resid_post.0" and 0.5 <= facts["balanced_accuracy"] <= 1


def test_text_is_gated_token_by_token(tiny_model64: Any, ioi: Any) -> None:
    action = made("cast", tiny_model64, ioi, when="order=ABBA", read_at="resid_post.0")
    assert action.at is not None
    text = ["The garden near the river was bright in autumn and the people walked"]
    strong = action.at(8.0)
    watch = strong.interventions[0]
    stream = tiny_model64.run(text[0], capture=["resid_post.0"])["resid_post.0"][0, 1:]
    some = (stream @ watch.value > watch.low).sum()
    same = text_loss(tiny_model64, text, strong) == pytest.approx(text_loss(tiny_model64, text, NOTHING))
    assert same == (int(some) == 0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12))
def test_no_threshold_is_better(seed: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    yes, no = (torch.randn(n, 3, generator=draw, dtype=torch.float64) + shift for shift in (0.7, 0.0))
    unit, threshold, right = condition(yes, no)
    inside, outside = (yes @ unit).numpy(), (no @ unit).numpy()

    def judge(cut: float) -> float:
        return float(((inside > cut).mean() + (outside <= cut).mean()) / 2)

    assert judge(threshold) == pytest.approx(right)
    levels = np.sort(np.concatenate([inside, outside]))
    every = [levels[0] - 1, *(levels[1:] + levels[:-1]) / 2, levels[-1] + 1]
    assert right == pytest.approx(max(judge(cut) for cut in every)) and right > 0.5


def test_conditions_that_cannot_be_read_are_refused(tiny_model64: Any, ioi: Any) -> None:
    with pytest.raises(MethodError, match="read before it is used"):
        made("cast", tiny_model64, ioi, sites="resid_post.0", read_at="resid_post.2")
    with pytest.raises(MethodError, match="prompts on which not to act"):
        made("cast", tiny_model64, ioi, apart_from=())
    with pytest.raises(MethodError, match=r"Name a head, such as z\.1\.h0"):
        made("probe", tiny_model64, ioi, sites="z.1")
    assert made("probe", tiny_model64, ioi, sites="z.1.h2").interventions[0].value.shape == (8,)
    with pytest.raises(MethodError, match="no strength to try"):
        made("caa", tiny_model64, ioi, strengths=())


@pytest.mark.parametrize("method", STEERING)
def test_files_give_back_the_same_action(tiny_model64: Any, ioi: Any, method: str, tmp_path: Path) -> None:
    action = made(method, tiny_model64, ioi)
    back = load(save(action, tmp_path / "action.safetensors", model=tiny_model64))
    assert (back.name, back.goal, back.config, back.values) == (action.name, action.goal, action.config, action.values)
    assert back.sweep is not None and action.sweep is not None and back.sweep.height == action.sweep.height
    bound = ioi.test.bind(tiny_model64)
    one, two = (score(tiny_model64, bound, some, ["logit_diff"]) for some in (action, back))
    assert one.equals(two)
    said = {
        some: tiny_model64.generate(PROMPT, max_new_tokens=3, interventions=some.interventions)
        for some in (action, back)
    }
    assert said[action] == said[back]


def test_actions_of_other_kinds_have_files_too(tiny_model64: Any, ioi: Any, tmp_path: Path) -> None:
    from headwater.act import amplify, knock_out, prompt

    bound = ioi.test.bind(tiny_model64)
    for action in (
        knock_out(tiny_model64, ["a1.h0", "m1"], ioi), amplify(tiny_model64, ["a1.h0"], ioi), prompt(tiny_model64, ioi),
        act("repair", tiny_model64, ioi, **FREE),
    ):  # fmt: skip
        back = load(save(action, tmp_path / "some"))
        one, two = (score(tiny_model64, bound, some, ["logit_diff"]) for some in (action, back))
        assert one.equals(two) and back.prefix == action.prefix
    held = Action(name="held", interventions=(hw.replace("mlp_out.0", [torch.ones(32), torch.zeros(32)]),))
    with pytest.raises(MethodError, match="cannot be kept in a file"):
        save(held, tmp_path / "held")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(StoreError):
        load(tmp_path / "junk")


def test_curves_are_what_each_strength_does(tiny_model64: Any, ioi: Any) -> None:
    actions = [made("caa", tiny_model64, ioi), act("repair", tiny_model64, ioi, **FREE)]
    texts = ["The garden near the river was bright in autumn", "A dog and a bird walked along the road"]
    found = curves(tiny_model64, ioi, actions, (1.5, 3.0), text=texts)
    table = found.tables["curve"]
    bound = ioi.test.bind(tiny_model64)
    for action, name in zip(actions, table["action"].unique(maintain_order=True), strict=True):
        assert action.at is not None
        mine = table.filter(action=name)
        assert mine["strength"].to_list() == [None, *sorted({1.5, 3.0, action.config["strength"]})]
        assert mine.filter("chosen")["strength"].to_list() == [action.config["strength"]]
        for row in mine.iter_rows(named=True):
            changed = action.at(row["strength"]) if row["strength"] is not None else NOTHING
            said = score(tiny_model64, bound, changed, ["logit_diff", "accuracy"])
            assert row["value"] == pytest.approx(said["logit_diff"].mean())
            assert row["accuracy"] == pytest.approx(said["accuracy"].mean())
            loss = text_loss(tiny_model64, texts, changed, tokens=48)
            assert row["perplexity"] == pytest.approx(np.exp(loss.mean()))
            assert row["lo"] <= row["value"] <= row["hi"]
    assert found.chart().to_dict()
    with pytest.raises(MethodError, match="actions with a strength"):
        curves(tiny_model64, ioi, NOTHING)


def test_nothing_is_not_strength_zero(tiny_model64: Any, ioi: Any) -> None:
    """At strength 0 the neurons of `value_vectors` are out, and `affine` sets the counterfactuals' level."""
    actions = [
        act("value_vectors", tiny_model64, ioi, neurons=20, strengths=(0.0,), **FREE),
        made("affine", tiny_model64, ioi),
    ]
    table = curves(tiny_model64, ioi, actions, (0, 1), text=["The garden near the river"], text_tokens=4).tables[
        "curve"
    ]
    bound = ioi.test.bind(tiny_model64)
    plain = score(tiny_model64, bound, NOTHING, ["logit_diff"])["logit_diff"].mean()
    for action, name in zip(actions, table["action"].unique(maintain_order=True), strict=True):
        assert action.at is not None
        mine = table.filter(action=name)
        assert mine["strength"].to_list() == [None, *sorted({0.0, 1.0, action.config["strength"]})]
        assert mine["value"][0] == pytest.approx(plain) and not mine["chosen"][0]
        out = score(tiny_model64, bound, action.at(0.0), ["logit_diff"])["logit_diff"].mean()
        assert mine.filter(strength=0.0)["value"].item() == pytest.approx(out) and abs(out - plain) > 1e-6
        assert mine.filter("chosen")["strength"].to_list() == [action.config["strength"]]


@pytest.mark.parametrize("reads", ["responses", "prompts"])
def test_a_persona_is_what_answers_hold(tiny_model64: Any, reads: str) -> None:
    pairs = persona_pairs("cheerful")
    options = {"sites": "resid_post.1", "n": 2, "max_perplexity": 1e9, "tokens": 3, "reads": reads}
    action = act("persona", tiny_model64, pairs, **options)
    means = []
    for told in (TRAITS["cheerful"].wanted, TRAITS["cheerful"].unwanted):
        rows = []
        for one in told:
            for asked in _ASKED:
                prompt = f"{one}\nQuestion: {asked}\nAnswer:"
                n = len(tiny_model64.tokens(prompt)[0])
                whole = prompt + tiny_model64.generate(prompt, max_new_tokens=3) if reads == "responses" else prompt
                stream = tiny_model64.run(whole, capture=["resid_post.1"])["resid_post.1"][0]
                rows.append(stream[n:].mean(0) if len(stream) > n else stream[-1])
        means.append(torch.stack(rows).mean(0))
    assert torch.allclose(action.interventions[0].value, means[0] - means[1], atol=1e-9)
    lower = act("persona", tiny_model64, pairs, **options, goal="lower")
    assert torch.allclose(lower.interventions[0].value, means[1] - means[0], atol=1e-9)
    with pytest.raises(MethodError, match="unknown trait"):
        act("persona", tiny_model64, pairs, trait="cheerfull")
    with pytest.raises(MethodError, match="raised or lowered"):
        act("persona", tiny_model64, pairs, goal="split=train")


def test_unknown_methods_list_near_ones() -> None:
    with pytest.raises(MethodError, match="caa"):
        methods.get("caaa")
    assert set(STEERING) <= set(methods.names())
