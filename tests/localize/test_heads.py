"""Head roles: attention against plain definitions, roles built into a model, effects against the model itself."""

import math

import pytest
import torch

import headwater as hw
import tiny
from headwater.core.errors import MethodError
from headwater.core.interventions import replace
from headwater.core.results import load_result
from headwater.localize.comparing.heads import (
    ROLES,
    HeadsResult,
    attention_on_random_tokens,
    attention_to_places,
    direct_effects,
    heads,
    mean_outputs,
    metric_values,
    random_heads,
)


@pytest.fixture(scope="module")
def ioi():
    return hw.behavior("ioi", n=24, seed=0)


def shifted_attention(shift: int):
    """A GPT-2 whose head 1 of layer 0 attends `shift` positions back: queries are turned positions, keys positions."""
    gpt2 = tiny.tiny_gpt2(n_embd=32, n_head=2, n_layer=2)
    width, half = 16, 8
    frequency = torch.exp(-torch.arange(half) * math.log(50.0) / half)
    angle = torch.arange(256)[:, None] * frequency
    with torch.no_grad():
        block = gpt2.transformer.h[0]
        gpt2.transformer.wte.weight *= 0.02
        positions = torch.zeros(256, 32)
        positions[:, :half], positions[:, half:width] = angle.cos(), angle.sin()
        gpt2.transformer.wpe.weight.copy_(torch.cat([positions[:, :width], -positions[:, :width]], dim=1))
        gpt2.transformer.wpe.weight[:, width:] = 0.0
        weight = torch.zeros(32, 3 * 32)
        turned = torch.zeros(width, width)
        for i in range(half):  # q(t) = k(t - shift)
            c, s = math.cos(shift * float(frequency[i])), math.sin(shift * float(frequency[i]))
            turned[i, i], turned[half + i, i] = c, s
            turned[i, half + i], turned[half + i, half + i] = -s, c
        weight[:width, width : 2 * width] = 12 * turned
        weight[:width, 32 + width : 32 + 2 * width] = torch.eye(width)
        weight[:, 64:] = block.attn.c_attn.weight[:, 64:]
        block.attn.c_attn.weight.copy_(weight)
        block.attn.c_attn.bias.zero_()
    return hw.load(gpt2, tokenizer=tiny.tiny_tokenizer())


def test_a_previous_token_head_that_was_built_in_is_found(ioi):
    model = shifted_attention(1)
    scores = attention_on_random_tokens(model, sequences=3, length=12)
    assert float(scores["previous_token"][0, 1]) > 0.6
    found = heads(model, ioi, top=1, n_train=8, n_test=8, null_heads=2, sequences=3, length=12)
    assert found.heads_of("previous_token") == [(0, 1)]
    row = found.to_frame().filter(role="previous_token").to_dicts()[0]
    assert row["attention"] > 0.5 > row["attention_null"] and row["attention_p"] == 0.25  # 4 heads, the first of them


def test_a_duplicate_token_head_is_told_from_an_induction_head():
    length = 12
    same = attention_on_random_tokens(shifted_attention(length), sequences=3, length=length)
    after = attention_on_random_tokens(shifted_attention(length - 1), sequences=3, length=length)
    assert float(same["duplicate_token"][0, 1]) > 0.6 > 0.3 > float(same["induction"][0, 1])
    assert float(after["induction"][0, 1]) > 0.6 > 0.3 > float(after["duplicate_token"][0, 1])


def test_attention_to_places_is_the_patterns_entry(tiny_model, ioi):
    pairs = ioi.test[:6].bind(tiny_model)
    found = attention_to_places(tiny_model, pairs, list(ROLES))
    at = 0
    for group in pairs.groups:
        run = tiny_model.run(group.clean, capture="pattern.2", logits="none")
        for b in range(len(group)):
            pattern = run["pattern.2"][b]
            io, s1, s2 = (int(group.positions[name][b]) for name in ("IO", "S1", "S2"))
            expected = {
                "name_mover": pattern[:, -1, io], "duplicate_token": pattern[:, s2, s1],
                "induction": pattern[:, s2, s1 + 1], "s_inhibition": pattern[:, -1, s2],
                "negative_mover": pattern[:, -1, io], "subject_suppressor": pattern[:, -1, s2],
                "previous_token": pattern[:, 1:].diagonal(dim1=1, dim2=2)[:, 1:].mean(dim=1),
            }  # fmt: skip
            for role, values in expected.items():
                torch.testing.assert_close(found[role][at, 2].float(), values.float())
            at += 1
    assert at == pairs.n


def test_a_place_that_a_behavior_lacks_is_not_measured(tiny_model):
    pairs = hw.behavior("agreement", n=12, seed=0).bind(tiny_model)
    found = attention_to_places(tiny_model, pairs, ["s_inhibition", "name_mover", "previous_token"])
    assert found["s_inhibition"] is None and found["name_mover"] is None and found["previous_token"] is not None


def test_direct_effects_add_up_to_the_gradient_along_attention(tiny_model64, ioi):
    pairs = ioi.train[:4].bind(tiny_model64)
    found = direct_effects(tiny_model64, pairs)
    total = torch.zeros(tiny_model64.n_layers, dtype=torch.float64)
    for group in pairs.groups:
        last = f"resid_post.{tiny_model64.n_layers - 1}"
        run = tiny_model64.run(group.clean, capture=[last, "attn_out.*"], logits="last", grad=True)
        rows = torch.arange(len(group))
        value = run.logits[rows, group.answers[:, 0]] - run.logits[rows, group.foils[:, 0]]
        gradient = run.grads(value.sum(), [last])[last][:, -1]
        for layer in range(tiny_model64.n_layers):
            total[layer] += (run[f"attn_out.{layer}"][:, -1] * gradient).sum().detach()
    torch.testing.assert_close(found.sum(dim=1), total / pairs.n)


def test_patching_with_means_is_what_the_model_gives(tiny_model, ioi):
    pairs = ioi.test[:5].bind(tiny_model)
    means = mean_outputs(tiny_model, ioi.train[:6].bind(tiny_model))
    values = metric_values(tiny_model, pairs, out=[(1, 2), (2, 0)], means=means)
    plain = []
    for group in pairs.groups:
        edits = [replace("z.1.h2", means[1, 2]), replace("z.2.h0", means[2, 0])]
        with tiny_model.intervene(*edits):
            logits = tiny_model.hf(group.clean).logits[:, -1]
        rows = torch.arange(len(group))
        plain.append(logits[rows, group.answers[:, 0]] - logits[rows, group.foils[:, 0]])
    torch.testing.assert_close(values, torch.cat(plain).double().detach())
    assert not torch.allclose(values, metric_values(tiny_model, pairs))
    every = torch.cat([
        tiny_model.run(group.clean, capture="z.1", logits="none")["z.1"][:, 1:].reshape(-1, 4, tiny_model.d_head)
        for group in ioi.train[:6].bind(tiny_model).groups
    ])  # fmt: skip
    torch.testing.assert_close(means[1], every.mean(dim=0))
    with pytest.raises(MethodError, match="means"):
        metric_values(tiny_model, pairs, out=[(0, 0)])


def test_result_holds_what_its_contract_says_and_comes_back(tiny_model, ioi, tmp_path):
    options = {"top": 2, "least": 0.01, "n_train": 8, "n_test": 8, "null_heads": 3, "sequences": 2, "length": 6}
    found = heads(tiny_model, ioi, **options)
    table = found.to_frame()
    assert table.columns[:9] == ["layer", "head", "role", "attention", "effect", "lo", "hi", "null", "p"]
    assert table.height and (table["lo"] <= table["effect"]).all() and (table["effect"] <= table["hi"]).all()
    assert set(table["role"]) | set(found.facts["absent"]) == set(found.facts["descriptions"])
    named = set(map(tuple, table.select("layer", "head").rows()))
    assert not named & {tuple(head) for head in found.facts["null_heads"]} or len(named) > 8
    assert heads(tiny_model, ioi, **options).content_hash == found.content_hash
    loaded = load_result(found.save(tmp_path / "heads"), check=True)
    assert isinstance(loaded, HeadsResult) and loaded.found == found.found
    ranked = heads(tiny_model, ioi, scores={(2, 3): 5.0, (0, 0): 0.0}, **options)
    assert (0, 0) not in ranked.heads_of("s_inhibition")


def test_random_heads_avoid_the_named_ones():
    named = [(1, 0), (1, 1)]
    found = random_heads(3, 4, named, 2, seed=1)
    assert sorted(found) == [(1, 2), (1, 3)]
    assert random_heads(1, 2, [(0, 0), (0, 1)], 3)  # no others: the null falls back on what there is


def test_unknown_roles_and_options_are_refused(tiny_model, ioi):
    with pytest.raises(MethodError, match="induction"):
        heads(tiny_model, ioi, roles=("inductio",))
    with pytest.raises(MethodError, match="least"):
        heads(tiny_model, ioi, leest=0.1)
