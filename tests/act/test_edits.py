"""Edits: any change of weights goes on as its definition says, and comes off to the bit."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import headwater as hw
import localize_families
from headwater.act import effect
from headwater.act.action import Action, Goal
from headwater.act.applying import applied, base_fingerprint, undo
from headwater.act.edit import Delta, Edit, load_tensors, save_tensors
from headwater.act.measuring import NOTHING, score, text_loss
from headwater.core.errors import MethodError, ModelError, StoreError

FAMILIES = ["llama", "gpt2", "neox", "gptj", "phi3", "gemma3", "olmo2", "opt", "mixtral", "bert"]


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.hf.state_dict().items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def random_delta(model: Any, name: str, kind: str, seed: int) -> Delta:
    shape = dict(model.hf.named_parameters())[name].shape
    draw = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    if kind == "low_rank" and len(shape) == 2:
        return Delta.low_rank(name, noise(shape[0], 2), noise(2, shape[1]))
    if kind == "slices":
        dim = seed % len(shape)
        index = torch.randperm(shape[dim], generator=draw)[: max(1, shape[dim] // 3)]
        size = [len(index) if at == dim else length for at, length in enumerate(shape)]
        return Delta.slices(name, index, noise(*size), dim=dim)
    return Delta.full(name, noise(*shape))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return localize_families.make(request.param)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(["full", "low_rank", "slices"]), min_size=1, max_size=4), seed=st.integers(0, 10**6)
)
def test_undone_to_the_bit_in_any_family(family: Any, kinds: list[str], seed: int) -> None:
    names = [name for name, _ in family.hf.named_parameters()]
    before, print_before = state_of(family), family.fingerprint
    expected = {name: value.clone() for name, value in before.items()}
    deltas = []
    for at, kind in enumerate(kinds):
        name = names[(seed + 7 * at) % len(names)]
        deltas.append(random_delta(family, name, kind, seed + at))
        expected[name][deltas[-1].where()] += deltas[-1].value()
    edit = Edit.of(family, "random", deltas)
    with edit.applied(family):
        assert same_bits(state_of(family), expected)
        assert family.fingerprint != print_before
        assert base_fingerprint(family) == print_before
        assert applied(family) == [edit]
    assert same_bits(state_of(family), before)
    assert family.fingerprint == print_before and applied(family) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_undone_in_every_precision(dtype: torch.dtype) -> None:
    model = localize_families.make("llama")
    model = hw.load(model.hf.to(dtype))
    before = state_of(model)
    name = "model.layers.0.mlp.down_proj.weight"
    edit = Edit.of(model, "strong", [random_delta(model, name, "low_rank", 0).times(100.0)])
    with edit.applied(model):
        wanted = (before[name].float() + edit.deltas[0].value().float()).to(dtype)
        assert torch.equal(dict(model.hf.named_parameters())[name], wanted)
    assert same_bits(state_of(model), before)


def test_a_stack_of_edits_comes_apart_in_any_order() -> None:
    model = localize_families.make("gpt2")
    name = "transformer.h.0.mlp.c_proj.weight"
    before = state_of(model)
    edits = [
        Edit.of(model, f"edit {kind}", [random_delta(model, name, kind, at)])
        for at, kind in enumerate(("full", "slices", "low_rank"))
    ]
    with edits[0].applied(model), edits[2].applied(model):
        without_the_second = state_of(model)
    for edit in edits:
        edit.apply(model)
    assert undo(model, edits[1]) == [edits[1]]
    assert applied(model) == [edits[0], edits[2]]
    assert same_bits(state_of(model), without_the_second)
    assert undo(model) == [edits[2]]
    edits[1].apply(model)
    assert undo(model, all=True) == [edits[0], edits[1]]
    assert same_bits(state_of(model), before)
    with pytest.raises(ModelError, match="no edit to undo"):
        undo(model)


def test_a_tied_weight_is_one_by_whichever_name(tmp_path: Path) -> None:
    import tiny
    from headwater.act.exporting import export, restore

    model = hw.load(tiny.tiny_llama(tie_word_embeddings=True), tokenizer=tiny.tiny_tokenizer())
    before = state_of(model)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    deltas = [random_delta(model, names[0], "slices", seed) for seed in (0, 2)]
    edits = [
        Edit.of(model, name, [dataclasses.replace(delta, parameter=name)])
        for name, delta in zip(names, deltas, strict=True)
    ]
    for first in (0, 1):
        for edit in edits:
            edit.apply(model)
        loaded = hw.load(export(model, tmp_path / f"edited {first}"))
        undo(model, edits[first])
        assert undo(model) == [edits[1 - first]] and same_bits(state_of(model), before)
        assert same_bits(state_of(restore(tmp_path / f"edited {first}", loaded)), before)


def test_an_edit_made_on_an_edited_model_fits_that_one_only() -> None:
    model = localize_families.make("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    first = Edit.of(model, "first", [random_delta(model, name, "slices", 0)])
    with first.applied(model):
        second = Edit.of(model, "second", [random_delta(model, name, "full", 1)])
        with second.applied(model):
            assert applied(model) == [first, second]
    with pytest.raises(ModelError, match="made for another model"):
        second.apply(model)
    assert applied(model) == []


def test_what_is_refused() -> None:
    model, other = localize_families.make("llama"), localize_families.make("llama", seed=1)
    name = "model.layers.0.mlp.down_proj.weight"
    shape = list(dict(model.hf.named_parameters())[name].shape)
    edit = Edit.of(model, "an edit", [random_delta(model, name, "full", 0)])
    with pytest.raises(ModelError, match=f"made for another model.*{other.fingerprint}.*{model.fingerprint}"):
        edit.apply(other)
    with edit.applied(model), pytest.raises(ModelError, match="on this model already"):
        edit.apply(model)
    with pytest.raises(ModelError, match="'an edit' is not on this model"), edit.applied(model):
        undo(model)
        Edit.of(model, "another", edit.deltas).apply(model)
        undo(model, edit)
    undo(model)
    for wrong, said in [
        (Delta.full(name, torch.ones(3)), "does not fit"),
        (Delta.low_rank(name, torch.ones(shape[0] + 1, 1), torch.ones(1, shape[1])), "does not fit"),
        (Delta.slices(name, [shape[0]], torch.ones(1, shape[1])), "does not fit"),
        (Delta.full("nothing.of.the.sort", torch.ones(3)), "no such parameter"),
    ]:
        with pytest.raises(MethodError, match=said):
            Edit.of(model, "wrong", [wrong])
    with pytest.raises(MethodError, match="not finite"):
        Delta.full(name, torch.full(shape, torch.nan))
    with pytest.raises(MethodError, match="factors"):
        Delta.low_rank(name, torch.ones(4, 2), torch.ones(3, 4))
    with pytest.raises(MethodError, match="index"):
        Delta.slices(name, [1, 1], torch.ones(2, shape[1]))
    with pytest.raises(MethodError, match="changes nothing"):
        Edit.of(model, "empty", [])


def test_weights_that_something_else_changed_are_left_alone() -> None:
    model = localize_families.make("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    edit = Edit.of(model, "an edit", [random_delta(model, name, "slices", 0)])
    edit.apply(model)
    with torch.no_grad():
        dict(model.hf.named_parameters())[name].mul_(2.0)
    now = state_of(model)
    with pytest.raises(ModelError, match="changed since the edit was applied"):
        undo(model)
    assert same_bits(state_of(model), now)


def test_a_failing_edit_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = localize_families.make("llama")
    before = state_of(model)
    good = random_delta(model, "model.layers.0.mlp.down_proj.weight", "full", 0)
    bad = random_delta(model, "model.layers.1.mlp.down_proj.weight", "full", 0)
    edit = Edit.of(model, "an edit", [good, bad])
    real = Delta.value

    def value(self: Delta) -> Tensor:
        if self is bad:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Delta, "value", value)
    with pytest.raises(KeyboardInterrupt):
        edit.apply(model)
    assert applied(model) == [] and same_bits(state_of(model), before)


def test_sizes_scaling_and_random_versions() -> None:
    model = localize_families.make("llama")
    down, up = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    shape = dict(model.hf.named_parameters())[down].shape
    right = torch.zeros(1, shape[1], dtype=torch.float64)
    right[:, :5] = 1.0
    low = Delta.low_rank(down, torch.ones(shape[0], 1, dtype=torch.float64), right)
    edit = Edit.of(model, "an edit", [low, random_delta(model, up, "slices", 0)])
    n_up = edit.deltas[1].tensors["change"].numel()
    assert edit.sizes(model) == {down: 5 * shape[0], up: n_up}
    assert edit.n_weights(model) == 5 * shape[0] + n_up
    assert low.stored == shape[0] + shape[1]
    assert edit.scaled(-2.0).norm == pytest.approx(2 * edit.norm)
    assert torch.equal(edit.scaled(-2.0).deltas[0].value(), -2 * low.value())
    one, two, again = edit.at_random(0), edit.at_random(1), edit.at_random(0)
    assert one.norm == pytest.approx(edit.norm) and one.sizes(model) == edit.sizes(model)
    for mine, other, repeated, original in zip(one.deltas, two.deltas, again.deltas, edit.deltas, strict=True):
        assert float(mine.value().norm()) == pytest.approx(float(original.value().norm()))
        assert torch.equal(mine.value(), repeated.value()) and not torch.equal(mine.value(), other.value())
        assert torch.equal(mine.value() == 0, original.value() == 0)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    model = localize_families.make("gpt2")
    names = [name for name, value in model.hf.named_parameters() if value.ndim == 2]
    kinds = ("full", "low_rank", "slices")
    edit = Edit.of(model, "an edit", [random_delta(model, names[i], k, i) for i, k in enumerate(kinds)], rate=0.5)
    path = edit.save(tmp_path / "some" / "edit.safetensors")
    back = Edit.load(path)
    assert (back.name, back.fingerprint, back.model, back.config) == (
        edit.name,
        edit.fingerprint,
        edit.model,
        {"rate": 0.5},
    )
    for mine, stored in zip(edit.deltas, back.deltas, strict=True):
        assert (mine.parameter, mine.kind, mine.dim) == (stored.parameter, stored.kind, stored.dim)
        assert torch.equal(mine.value(), stored.value())
    with edit.applied(model):
        wanted = state_of(model)
    with back.applied(model):
        assert same_bits(state_of(model), wanted)
    assert path.read_bytes() == edit.save(tmp_path / "again.safetensors").read_bytes()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    model = localize_families.make("llama")
    edit = Edit.of(model, "e", [random_delta(model, "model.layers.0.mlp.down_proj.weight", "low_rank", 0)])
    facts, tensors = load_tensors(edit.save(tmp_path / "good"))
    junk = tmp_path / "junk"
    junk.write_bytes(b"no safetensors at all")
    with pytest.raises(StoreError, match="cannot be read"):
        Edit.load(junk)
    with pytest.raises(StoreError, match="No such file"):
        Edit.load(tmp_path / "missing")
    with pytest.raises(StoreError, match="folder"):
        Edit.load(tmp_path)
    broken: list[tuple[Any, dict[str, Tensor], str]] = [
        (facts, {}, "whole edit"),
        ({**facts, "deltas": [{"parameter": 1}]}, tensors, "whole edit"),
        ({**facts, "deltas": [{**facts["deltas"][0], "kind": "strange"}]}, tensors, "whole edit"),
        ({**facts, "deltas": []}, tensors, "changes nothing"),
        ({"kind": "action"}, {}, "no edit of weights"),
    ]
    for some, held, said in broken:
        wrong = {key: value for key, value in some.items() if key != "format"}
        with pytest.raises(StoreError, match=said):
            Edit.load(save_tensors(tmp_path / "broken", wrong, {**held, "other": torch.ones(1)}))
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(StoreError, match="not written by headwater"):
        Edit.load(tmp_path / "foreign")
    save_file({"x": torch.ones(1)}, tmp_path / "new", {"headwater": json.dumps({"format": 99})})
    with pytest.raises(StoreError, match="another format"):
        Edit.load(tmp_path / "new")


def test_copies_of_a_model_are_models_of_their_own() -> None:
    model = localize_families.make("llama")
    edit = Edit.of(model, "e", [random_delta(model, "model.layers.0.mlp.down_proj.weight", "full", 0)])
    twin = hw.load(copy.deepcopy(model.hf))
    shared = hw.load(model.hf)
    with edit.applied(model):
        assert applied(shared) == [edit] and applied(twin) == []
        with edit.applied(twin):  # the same weights: the edit fits
            assert twin.fingerprint == model.fingerprint


def test_effect_measures_an_edit_as_any_other_action(tiny_model64: Any) -> None:
    ioi = hw.behavior("ioi", n=24, seed=0)
    name = "model.layers.1.mlp.down_proj.weight"
    edit = Edit.of(tiny_model64, "shrink", [random_delta(tiny_model64, name, "low_rank", 0)])
    before = state_of(tiny_model64)
    action = Action(
        name="shrink",
        edit=edit,
        goal=Goal(direction="lower"),
        seconds=1.5,
        control=lambda seed: Action(name="at random", edit=edit.at_random(seed), goal=Goal(direction="lower")),
    )
    with pytest.raises(MethodError, match="changes weights"):
        tiny_model64.intervene(*action)
    text = ["The garden near the river was bright in autumn"]
    others = [hw.behavior("agreement", n=20, seed=1)]
    found = effect(tiny_model64, ioi, action, others=others, text=text, controls=2, prompting=False)
    assert same_bits(state_of(tiny_model64), before) and applied(tiny_model64) == []
    bound = ioi.test.bind(tiny_model64)
    plain = score(tiny_model64, bound, NOTHING, ["logit_diff"])["logit_diff"]
    with edit.applied(tiny_model64):
        edited = score(tiny_model64, bound, NOTHING, ["logit_diff"])["logit_diff"]
        loss = text_loss(tiny_model64, text, NOTHING)
    assert score(tiny_model64, bound, action, ["logit_diff"])["logit_diff"].equals(edited)
    assert text_loss(tiny_model64, text, action) == pytest.approx(loss)
    rows = found.tables["rows"].filter(pl.col("action") == "shrink")
    first = rows.row(0, named=True)
    assert (first["before"], first["after"]) == (pytest.approx(plain.mean()), pytest.approx(edited.mean()))
    assert first["change"] != 0
    assert rows.filter(pl.col("measure") == "text perplexity")["after"].item() == pytest.approx(math.exp(loss.mean()))
    cost = found.facts["costs"][0]
    assert cost["weights_changed"] == edit.n_weights(tiny_model64) > 0
    assert found.seconds_to_find == {"shrink": 1.5} and found.seconds["shrink"] > 0
    with action.on(tiny_model64):
        assert applied(tiny_model64) == [edit]


@pytest.mark.real_model
def test_undone_to_the_bit_on_the_real_model(smollm2: Any) -> None:
    from headwater.act.editing.orthogonalize import without
    from headwater.act.editing.repair import scaled_heads

    before, print_before = state_of(smollm2), smollm2.fingerprint
    down, bias = "model.layers.7.mlp.down_proj.weight", "model.layers.3.input_layernorm.weight"
    edits = [
        Edit.of(smollm2, "orthogonalize", without(smollm2, torch.randn(576), embedding=True)),
        Edit.of(smollm2, "scale heads", scaled_heads(smollm2, {(20, 3): 2.5, (20, 4): 0.5, (3, 0): 0.0})),
        Edit.of(smollm2, "all kinds", [
            random_delta(smollm2, down, kind, at) for at, kind in enumerate(("low_rank", "slices", "full"))
        ] + [random_delta(smollm2, bias, "full", 9)]),
    ]  # fmt: skip
    for edit in edits:
        edit.apply(smollm2)
    assert smollm2.fingerprint != print_before
    undo(smollm2, edits[1])
    undo(smollm2, all=True)
    assert same_bits(state_of(smollm2), before) and smollm2.fingerprint == print_before


def test_what_is_cached_of_a_model_is_not_stale_under_an_edit(tiny_model64: Any) -> None:
    ioi = hw.behavior("ioi", n=12, seed=0)
    plain = hw.localize.eap(tiny_model64, ioi)  # fills what is kept of the model
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"]
    names += ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"]
    edit = Edit.of(tiny_model64, "e", [random_delta(tiny_model64, name, "full", 3).times(0.1) for name in names])
    with edit.applied(tiny_model64):
        under = hw.localize.eap(tiny_model64, ioi)
        fresh = hw.load(copy.deepcopy(tiny_model64.hf), tokenizer=tiny_model64.tokenizer)
    wanted = hw.localize.eap(fresh, ioi)
    assert under.tables["edges"].equals(wanted.tables["edges"])
    assert not under.tables["edges"].equals(plain.tables["edges"])
    assert under.provenance.fingerprint == wanted.provenance.fingerprint != plain.provenance.fingerprint
