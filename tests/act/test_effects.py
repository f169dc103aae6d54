"""Effect: what is measured is what transformers itself gives, and nothing stays behind."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import headwater as hw
from headwater.act import Action, Effect, effect, knock_out, plain_texts, steer
from headwater.act.action import Goal
from headwater.act.measuring import NOTHING, text_loss, texts_of
from headwater.behavior.table import Behavior
from headwater.claims.statistics import bootstrap
from headwater.core.errors import BehaviorError, MethodError, ModelError
from headwater.core.interventions import replace

TEXTS = ["The garden near the river was bright in autumn and the people walked along the road", "A dog and a bird"]


@pytest.fixture(scope="module")
def ioi() -> Behavior:
    return hw.behavior("ioi", n=40, seed=0)


@pytest.fixture(scope="module")
def others() -> list[Behavior]:
    return [hw.behavior("agreement", n=40, seed=1), hw.behavior("successor", n=30, seed=1)]


@pytest.fixture(scope="module")
def found(tiny_model64: Any, ioi: Behavior, others: list[Behavior]) -> Effect:
    actions = [knock_out(tiny_model64, ["a1.h0", "a2.h1", "m1"], ioi)]
    actions.append(steer(tiny_model64, ioi, "resid_post.1", goal="order=ABBA", n=6, max_perplexity=1e9))
    return effect(tiny_model64, ioi, actions, others=others, text=TEXTS, controls=3)


def row(result: Effect, action: str, measure: str) -> dict[str, Any]:
    table = result.tables["rows"].filter((pl.col("action") == action) & (pl.col("measure") == measure))
    assert table.height == 1, (action, measure, result.tables["rows"])
    return table.row(0, named=True)


def by_hand(model: Any, behavior: Behavior, interventions: Any = ()) -> dict[str, float]:
    """The logit difference of each test pair, one prompt at a time."""
    values = {}
    for pair in behavior.test.bind(model).frame.to_dicts():
        out = model.run(pair["prompt"], logits="last", interventions=interventions).logits[0]
        ids = model.tokenizer(pair["prompt"]).input_ids
        answer, foil = (model.tokenizer(pair["prompt"] + pair[n][0]).input_ids[len(ids)] for n in ("answers", "foils"))
        values[pair["id"]] = float(out[answer] - out[foil])
    return values


def test_rows_are_means_over_test_pairs(tiny_model64: Any, ioi: Behavior, found: Effect) -> None:
    action = knock_out(tiny_model64, ["a1.h0", "a2.h1", "m1"], ioi)
    before, after = by_hand(tiny_model64, ioi), by_hand(tiny_model64, ioi, action.interventions)
    change = np.array([after[id] - before[id] for id in sorted(before)])
    got = row(found, action.name, "ioi logit_diff")
    assert got["before"] == pytest.approx(np.mean(list(before.values())), abs=1e-9)
    assert got["after"] == pytest.approx(np.mean(list(after.values())), abs=1e-9)
    interval = bootstrap(change, seed=0)
    assert (got["change"], got["lo"], got["hi"]) == pytest.approx(tuple(interval), abs=1e-9)
    assert got["lo"] < got["change"] < got["hi"]
    assert (got["n"], got["baseline"]) == (len(change), False)
    accuracy = row(found, action.name, "ioi accuracy")
    assert accuracy["after"] == pytest.approx(np.mean([value > 0 for value in after.values()]))


def test_preference_counts_the_other_value_down(tiny_model64: Any, ioi: Behavior, found: Effect) -> None:
    name = next(name for name, goal in found.facts["goals"].items() if goal == "order = ABBA")
    got = row(found, name, "ioi preference order = ABBA")
    sign = {id: 1 if order == "ABBA" else -1 for id, order in ioi.frame.select("id", "order").iter_rows()}
    before = by_hand(tiny_model64, ioi)
    assert got["before"] == pytest.approx(np.mean([sign[id] * value for id, value in before.items()]), abs=1e-9)
    versus = found.tables["versus"].filter(pl.col("action") == name)
    assert versus["gain"].to_list() == pytest.approx([got["change"]] * 2, abs=1e-9)
    first = found.tables["rows"].filter(pl.col("action") == name).row(0, named=True)
    assert first["measure"] == found.facts["measures"][name] == "ioi preference order = ABBA"


def test_others_and_text_are_measured_too(tiny_model64: Any, found: Effect, others: list[Behavior]) -> None:
    for name in found.facts["goals"]:
        for behavior in others:
            got = row(found, name, f"{behavior.name} logit_diff")
            assert got["before"] == pytest.approx(np.mean(list(by_hand(tiny_model64, behavior).values())), abs=1e-9)
        text = row(found, name, "text perplexity")
        assert text["before"] == pytest.approx(np.exp(text_loss(tiny_model64, TEXTS, NOTHING).mean()), rel=1e-9)
        assert text["change"] == pytest.approx(text["after"] - text["before"], rel=1e-9)
        assert text["n"] == 2


def test_controls_stand_beside_each_action(tiny_model64: Any, ioi: Behavior, found: Effect) -> None:
    actions = list(found.facts["goals"])
    versus = found.tables["versus"]
    assert versus["action"].to_list() == [actions[0], actions[0], actions[1], actions[1]]
    assert found.tables["rows"].filter("baseline")["action"].n_unique() == 4  # a random version and a prompt each
    draws = found.tables["draws"]
    assert draws.group_by("action", maintain_order=True).len()["len"].to_list() == [3, 3]
    random = versus.filter(pl.col("control") == "knock out 2 heads and 1 MLP at random").row(0, named=True)
    mine = draws.filter(pl.col("action") == actions[0])["gain"]
    assert random["control_gain"] == pytest.approx(mine.mean(), abs=1e-9)
    control = knock_out(tiny_model64, ["a1.h0", "a2.h1", "m1"], ioi).control
    assert control is not None
    before = by_hand(tiny_model64, ioi)
    for draw in range(3):  # the goal is to lower: a fall is a gain
        after = by_hand(tiny_model64, ioi, control(draw).interventions)
        assert mine[draw] == pytest.approx(-np.mean([after[id] - before[id] for id in before]), abs=1e-9)
    for one in versus.iter_rows(named=True):
        assert one["difference"] == pytest.approx(one["gain"] - one["control_gain"], abs=1e-9)
        assert one["lo"] <= one["difference"] <= one["hi"]
    beaten = versus.filter(pl.col("action") == actions[1])["lo"].min() > 0  # type: ignore[operator]
    assert found.beats(actions[1]) is beaten
    with pytest.raises(MethodError, match="no such action"):
        found.beats("nothing of the sort")


def test_it_saves_loads_draws_and_repeats(
    tiny_model64: Any, ioi: Behavior, found: Effect, others: list[Behavior], tmp_path: Any
) -> None:
    found.save(tmp_path / "effect")
    loaded = hw.load_result(tmp_path / "effect")
    assert isinstance(loaded, Effect)
    assert loaded.content_hash == found.content_hash
    assert loaded.to_frame().equals(found.tables["rows"])
    assert loaded.seconds == pytest.approx(found.seconds)
    assert found.seconds
    assert loaded.chart() is not None
    actions = [knock_out(tiny_model64, ["a1.h0", "a2.h1", "m1"], ioi)]
    actions.append(steer(tiny_model64, ioi, "resid_post.1", goal="order=ABBA", n=6, max_perplexity=1e9))
    again = effect(tiny_model64, ioi, actions, others=others, text=TEXTS, controls=3)
    assert again.content_hash == found.content_hash


def test_costs_are_told(tiny_model64: Any, found: Effect) -> None:
    costs = {one["action"]: one for one in found.facts["costs"]}
    names = list(found.facts["goals"])
    assert costs[names[0]]["activations_a_token"] == 2 * tiny_model64.d_head + tiny_model64.d_model
    assert all(one["weights_changed"] == 0 for one in costs.values())
    assert costs[names[1]]["prompts_to_find"] > costs[names[0]]["prompts_to_find"] > 0
    prompts = [one for name, one in costs.items() if name.startswith("prompt")]
    assert all(one["tokens_added"] > 0 and one["activations_a_token"] == 0 for one in prompts)


def test_the_model_is_left_as_it_was(tiny_model64: Any, ioi: Behavior, others: list[Behavior]) -> None:
    ids = torch.tensor([[5, 17, 40, 8]])

    def hooks() -> int:  # transformers keeps some of its own
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_model64.hf.modules())

    before, print_before, hooks_before = tiny_model64.hf(ids).logits, tiny_model64.fingerprint, hooks()
    effect(tiny_model64, ioi, knock_out(tiny_model64, "m1", ioi), others=[], text=TEXTS, controls=1, prompting=False)
    assert torch.equal(tiny_model64.hf(ids).logits, before)
    assert tiny_model64.fingerprint == print_before
    assert hooks() == hooks_before


def test_doing_nothing_changes_nothing(tiny_model64: Any, ioi: Behavior) -> None:
    nothing = Action(name="nothing", goal=Goal.parse("lower"))
    found = effect(tiny_model64, ioi, nothing, others=[], text=TEXTS, prompting=False)
    assert set(found.tables["rows"]["change"]) == {0.0}
    assert found.tables["versus"].height == 0
    assert not found.beats()


def test_what_cannot_be_measured_says_so(tiny_model64: Any, ioi: Behavior, others: list[Behavior]) -> None:
    vector = torch.zeros(tiny_model64.d_model)
    named = Action(name="at S2", interventions=(replace("resid_post.1@S2", vector),), goal=Goal.parse("lower"))
    found = effect(tiny_model64, ioi, named, others=others[:1], text=TEXTS, prompting=False)
    lacking = row(found, "at S2", "agreement logit_diff")
    assert lacking["change"] is None
    assert "not measured" in lacking["note"]
    assert "S2" in lacking["note"]
    assert row(found, "at S2", "ioi logit_diff")["change"] is not None


def test_an_action_that_no_test_pair_takes_says_so(tiny_model64: Any, ioi: Behavior) -> None:
    vector = torch.zeros(tiny_model64.d_model)
    actions = [
        Action(name="nowhere", interventions=(replace("resid_post.1@nobody", vector),), goal=Goal.parse("lower")),
        Action(name="too long", prefix="the garden " * 124, goal=Goal.parse("lower")),
        knock_out(tiny_model64, "m1", ioi),
    ]
    found = effect(tiny_model64, ioi, actions, others=[], text=TEXTS, controls=1, prompting=True)
    for name in ("nowhere", "too long"):
        lacking = row(found, name, "ioi logit_diff")
        assert lacking["change"] is None and "not measured" in lacking["note"]
        assert not found.tables["versus"].filter(pl.col("action") == name)["lo"].is_not_null().any()
        assert not found.beats(name)
    assert found.tables["versus"].filter(pl.col("action") == actions[2].name)["lo"].is_not_null().all()
    assert found.chart() is not None


def test_default_others_pass_over_the_behavior_itself(tiny_model64: Any, ioi: Behavior) -> None:
    found = effect(tiny_model64, ioi, NOTHING, prompting=False, text=TEXTS, n_others=10)
    assert list(found.config["others"]) == ["agreement", "greater_than"]


def test_mistakes_are_named(tiny_model64: Any, ioi: Behavior) -> None:
    with pytest.raises(MethodError, match="no action"):
        effect(tiny_model64, ioi, [])
    with pytest.raises(MethodError, match="two actions have one name"):
        effect(tiny_model64, ioi, [NOTHING, NOTHING])
    with pytest.raises(MethodError, match="no text"):
        effect(tiny_model64, ioi, NOTHING, text="  \n\n ")
    with pytest.raises(MethodError, match="two behaviors have one name"):
        effect(tiny_model64, ioi, NOTHING, others=[ioi])
    with pytest.raises(BehaviorError, match="unknown behavior"):
        effect(tiny_model64, ioi, NOTHING, others=["ioii"])


# Text ---------------------------------------------------------------------------------------------------------------


def test_text_loss_is_the_models_own(tiny_gpt2_model64: Any) -> None:
    model = tiny_gpt2_model64
    found = text_loss(model, TEXTS, NOTHING, tokens=12)
    for text, loss in zip(TEXTS, found, strict=True):
        ids = torch.tensor([model.tokenizer(text).input_ids[:12]])
        with torch.inference_mode():
            assert loss == pytest.approx(float(model.hf(ids, labels=ids).loss), rel=1e-6)


@pytest.mark.parametrize("begins", [False, True])
def test_a_prefix_is_not_scored(tiny_gpt2: Any, begins: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    import tiny

    tokenizer = tiny.tiny_tokenizer()
    if begins:  # a tokenizer that begins each text with a token of its own, as Llama's and Gemma's do
        end = "<|endoftext|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    model = hw.load(tiny_gpt2, tokenizer=tokenizer)
    prefix = "Mary and John went home.\n"
    found = text_loss(model, TEXTS, Action(name="prefixed", prefix=prefix), tokens=10)
    plain = text_loss(model, TEXTS, NOTHING, tokens=10)
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text).input_ids[:10]
        whole = tokenizer(prefix).input_ids + ids[1 if begins else 0 :]
        scored = len(ids) - 1  # the same tokens with and without the prefix
        with torch.inference_mode():
            rows = torch.nn.functional.log_softmax(tiny_gpt2(torch.tensor([whole])).logits[0].double(), -1)
        wanted = -np.mean([float(rows[t - 1, whole[t]]) for t in range(len(whole) - scored, len(whole))])
        assert found[i] == pytest.approx(wanted, rel=1e-4)
    assert not np.allclose(found, plain)


def test_steering_holds_on_all_of_a_text(tiny_model64: Any) -> None:
    vector = torch.linspace(-1, 1, tiny_model64.d_model, dtype=torch.float64)
    action = Action(name="steer", interventions=(hw.add("resid_post.1", vector, positions=slice(-1, None)),))
    ids = torch.tensor([tiny_model64.tokenizer(TEXTS[0]).input_ids[:10]])
    edit = hw.add("resid_post.1", vector, positions=slice(1, None))
    rows = torch.log_softmax(tiny_model64.run(ids, interventions=[edit]).logits[0], -1)
    wanted = -np.mean([float(rows[t - 1, ids[0, t]]) for t in range(1, 10)])
    assert text_loss(tiny_model64, TEXTS[:1], action, tokens=10)[0] == pytest.approx(wanted, rel=1e-9)


def test_the_packages_texts() -> None:
    texts = plain_texts()
    assert len(texts) == 12
    assert all(len(text.split()) > 60 for text in texts)
    assert texts_of("One text\nof two lines.\n\nAnother.") == ["One text of two lines.", "Another."]
    assert texts_of(["a", " "]) == ["a"]


def test_texts_are_cut_to_what_the_model_reads() -> None:
    import tiny

    model = hw.load(tiny.tiny_llama(max_position_embeddings=16), tokenizer=tiny.tiny_tokenizer())
    found = text_loss(model, plain_texts()[:2], NOTHING, tokens=48)
    wanted = text_loss(model, plain_texts()[:2], NOTHING, tokens=16)
    assert found == pytest.approx(wanted)
    prefix = Action(name="prefixed", prefix="Mary and John went home.\n")
    assert len(model.tokens(prefix.prefix)[0]) > 4
    assert np.isfinite(text_loss(model, plain_texts()[:2], prefix, tokens=4)).all()
    with pytest.raises(ModelError, match="longer than the context"):  # not fewer tokens than without the prefix
        text_loss(model, plain_texts()[:2], prefix, tokens=48)


def test_texts_too_short_are_refused(tiny_model64: Any) -> None:
    with pytest.raises(MethodError, match="too short"):
        text_loss(tiny_model64, ["Mary"], NOTHING)


# The real model -----------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.slow
def test_steering_moves_smollm2(smollm2: Any, summary_table: Any) -> None:
    """One vector makes SmolLM2 answer with the first name, or the second, and beats prompting and random directions."""
    ioi = hw.behavior("ioi", n=40, seed=0)
    action = steer(smollm2, ioi, ["resid_post.19", "resid_post.20"], goal="order=ABBA", strengths=(1.0, 2.0), n=8)
    found = effect(smollm2, ioi, action, others=["agreement"], n_others=12, controls=2, text=plain_texts()[:3])
    got = row(found, action.name, "ioi preference order = ABBA")
    text = row(found, action.name, "text perplexity")
    assert got["lo"] > 1.0
    assert found.beats()
    assert text["after"] < 2 * text["before"]
    summary_table(
        f"{action.name}: preference {got['before']:.2f} -> {got['after']:.2f} [{got['lo']:.2f}, {got['hi']:.2f}], "
        f"text perplexity {text['before']:.1f} -> {text['after']:.1f}"
    )
