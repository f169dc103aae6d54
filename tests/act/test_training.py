"""Training: what plain torch trains, only where it may, and the model's own weights are never written."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import headwater as hw
import localize_families
from headwater.act.action import Goal
from headwater.act.catalog import act, methods
from headwater.act.edit import Delta
from headwater.act.locating import before_after, kept, lookup_parts, output_parts, profile
from headwater.act.measuring import NOTHING, score
from headwater.act.training.dpo import preference_loss
from headwater.act.training.examples import batches, draws, mean_loss, unwanted, wanted
from headwater.act.training.fitting import fit, twin_of
from headwater.act.training.weights import Weights, weights_of
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

FAMILIES = ["llama", "gpt2", "neox", "gptj", "phi3", "gemma3", "olmo2", "opt", "mixtral", "bert"]


@pytest.fixture(scope="module")
def capitals() -> Behavior:
    return hw.behavior("capitals", n=24, seed=0)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return localize_families.make(request.param)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.hf.state_dict().items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Tokens:
    """A language-model loss on fixed token ids: an objective without a tokenizer."""

    def __init__(self, vocabulary: int) -> None:
        self.ids_BT = torch.randint(0, vocabulary, (3, 7), generator=torch.Generator().manual_seed(1))

    def loss(self, hf: nn.Module) -> Tensor:
        return mean_loss(hf, self.ids_BT, torch.ones_like(self.ids_BT, dtype=torch.bool)).sum()

    def __call__(self, twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        loss = self.loss(twin)
        yield loss, float(loss.detach())


def test_training_is_that_of_plain_torch_in_any_family(family: Any) -> None:
    before, fingerprint = state_of(family), family.fingerprint
    asked = [parameter.requires_grad for parameter in family.hf.parameters()]
    objective = Tokens(localize_families.VOCAB)
    plain = copy.deepcopy(family.hf).eval()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        objective.loss(plain).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    found = fit(family, weights_of(family, "all"), objective, steps=3, lr=1e-2)
    assert same_bits(state_of(family), before) and family.fingerprint == fingerprint
    assert [parameter.requires_grad for parameter in family.hf.parameters()] == asked
    assert all(parameter.grad is None for parameter in family.hf.parameters())
    trained = dict(plain.named_parameters())
    changed = {delta.parameter for delta in found.deltas}
    for name, parameter in family.hf.named_parameters():
        expected = trained[name].detach() - parameter.detach()
        delta = next((one for one in found.deltas if one.parameter == name), None)
        assert (delta is None) == (not bool(expected.any()))
        if delta is not None:
            torch.testing.assert_close(delta.value(), expected, rtol=1e-7, atol=1e-9)
    assert changed and found.watched[0] > found.watched[-1]


@pytest.mark.parametrize("which", ["m1", "a0", "a1.h2", "layer.0", "embed"])
def test_only_the_named_weights_are_trained(family: Any, which: str) -> None:
    weights = weights_of(family, which)
    found = fit(family, weights, Tokens(localize_families.VOCAB), steps=2, lr=1e-2)
    assert found.deltas and {delta.parameter for delta in found.deltas} <= set(weights.parts)
    for name in weights.parts:
        assert ("0" if which in ("a0", "layer.0") else "1") in name or which == "embed"
    if which == "a1.h2":
        (delta,) = found.deltas
        module = family.anatomy.main.blocks[1].attention
        assert delta.kind == "slices" and len(delta.tensors["index"]) == module.d_value
        assert delta.tensors["index"].tolist() == list(range(2 * module.d_value, 3 * module.d_value))


def test_parts_add_up_to_their_layer(family: Any) -> None:
    layer, mlp, attention = (set(weights_of(family, one).parts) for one in ("layer.1", "m1", "a1"))
    assert mlp and attention and not mlp & attention and mlp | attention <= layer
    own = dict(family.hf.named_parameters())
    # what is left of a layer are its norms
    assert all(own[name].ndim == 1 for name in layer - mlp - attention)
    assert all(own[name].ndim > 1 or "bias" in name or "norm" in name for name in mlp | attention)


def test_a_part_named_twice_is_trained_once(tiny_model: Any) -> None:
    both = weights_of(tiny_model, "a1.h0+a1.h2")
    ((axis, index),) = [part for part in both.parts.values() if part is not None]
    assert axis == 1 and index.tolist() == [*range(8), *range(16, 24)]
    assert weights_of(tiny_model, "a1.h0+a1").parts[next(iter(both.parts))] is None
    assert len(weights_of(tiny_model, "model.layers.*.mlp.down_proj.weight").parts) == 3


@pytest.mark.parametrize("which", ["m9", "a1.h7", "nothing", "resid_post.1", "lookup:0", "*.nothing.*", "layer.9"])
def test_unknown_weights_are_refused(tiny_model: Any, capitals: Behavior, which: str) -> None:
    with pytest.raises(MethodError):
        weights_of(tiny_model, which, capitals)


def test_a_twin_shares_memory_but_for_what_is_trained(tiny_model: Any) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    twin = dict(twin_of(tiny_model.hf, [name]).named_parameters())
    for one, parameter in tiny_model.hf.named_parameters():
        assert (twin[one].data_ptr() == parameter.data_ptr()) == (one != name)
        assert twin[one].requires_grad == (one == name)


def test_tied_weights_stay_tied() -> None:
    import tiny

    model = hw.load(tiny.tiny_gpt2(tie_word_embeddings=True), tokenizer=tiny.tiny_tokenizer())
    twin = twin_of(model.hf, ["transformer.wte.weight"])
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight  # type: ignore[operator]
    assert list(weights_of(model, "logits").parts) == ["transformer.wte.weight"]


def test_bfloat16_is_trained_in_single_precision(capitals: Behavior) -> None:
    import tiny

    model = hw.load(tiny.tiny_llama(dtype=torch.bfloat16), tokenizer=tiny.tiny_tokenizer())
    before = state_of(model)
    made = act("finetune", model, capitals, steps=3, lr=1e-3, weights="m1")
    assert made.edit.deltas[0].tensors["change"].dtype == torch.float32
    with made.on(model):
        assert not same_bits(state_of(model), before)
    assert same_bits(state_of(model), before)


TRAINED: list[tuple[str, dict[str, Any]]] = [
    ("finetune", {"lr": 5e-3}),
    ("localized", {"lr": 2e-2}),
    ("localized", {"lr": 2e-2, "weights": "output:2"}),
    ("lora", {"lr": 2e-2}),
    ("dpo", {"lr": 5e-3, "until": 0.01}),
]


@pytest.mark.parametrize(("name", "options"), TRAINED)
def test_every_method_reaches_its_goal_and_is_undone_to_the_bit(
    tiny_model: Any, capitals: Behavior, name: str, options: dict[str, Any]
) -> None:
    before = state_of(tiny_model)
    train = capitals.train.bind(tiny_model)
    for goal, sign in (("raise", 1.0), ("lower", -1.0)):
        made = act(name, tiny_model, capitals, goal=goal, steps=30, **options)
        assert same_bits(state_of(tiny_model), before)
        was = score(tiny_model, train, NOTHING, ["logit_diff"])["logit_diff"].mean()
        now = score(tiny_model, train, made, ["logit_diff"])["logit_diff"].mean()
        assert sign * (now - was) > 2.0
        assert same_bits(state_of(tiny_model), before)
        assert made.goal == Goal(direction=goal) and made.passes > 0 and made.seconds > 0  # type: ignore[arg-type]
        drawn = made.control(3)
        assert drawn.edit.norm == pytest.approx(made.edit.norm, rel=1e-3)


def test_training_stops_when_it_is_enough(tiny_model: Any, capitals: Behavior) -> None:
    made = act("finetune", tiny_model, capitals, steps=200, lr=1e-2, until=1.0)
    assert made.config["updates"] < 200 and made.config["watched"] <= 1.0


def test_what_is_kept_stays_nearer(tiny_model: Any) -> None:
    changed = hw.behavior("capitals", n=12, seed=0)
    keep = hw.behavior("greater_than", n=12, seed=0)
    bound = keep.train.bind(tiny_model)
    found = {}
    for name, given in (("without", None), ("with", keep)):
        made = act("finetune", tiny_model, changed, steps=25, lr=5e-3, until=0.0, keep=given)
        found[name] = score(tiny_model, bound, made, ["prob"])["prob"].mean()
    assert found["with"] > 2 * found["without"]
    with pytest.raises(MethodError, match="behavior"):
        act("finetune", tiny_model, changed, keep=3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own wrapper asks for it
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_is_what_peft_trains(kind: str, capitals: Behavior) -> None:
    import peft

    import tiny

    hf = (tiny.tiny_llama if kind == "llama" else tiny.tiny_gpt2)()
    model = hw.load(hf, tokenizer=tiny.tiny_tokenizer())
    made = act("lora", model, capitals, steps=4, rank=3, alpha=5.0, lr=1e-2, until=0.0, seed=2)
    modules = list(hf.modules())
    assert not any("lora" in type(module).__module__ for module in modules)
    twin = copy.deepcopy(hf).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    # every linear module but the unembedding
    names = [
        name for name, module in twin.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not twin.lm_head
    ]  # fmt: skip
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, fan_in_fan_out=kind == "gpt2")
    wrapped = peft.get_peft_model(twin, config)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    some = wanted(model, capitals, Goal())
    order = draws(len(some), 8, 2)
    for _ in range(4):
        optimizer.zero_grad()
        numbers = next(order)
        parts = [
            mean_loss(wrapped, ids, learned).sum() / len(numbers) for _, ids, learned in batches(some, numbers, "cpu")
        ]
        sum(parts, torch.zeros(())).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    ids = model.tokens("The capital of France is Paris")[0][None]
    with torch.no_grad(), made.on(model):
        torch.testing.assert_close(hf(ids).logits, wrapped(ids).logits, rtol=1e-4, atol=1e-4)
        assert (hf(ids).logits - hf(ids + 1).logits).abs().max() > 1e-2
    assert all(delta.kind == "low_rank" for delta in made.edit.deltas) and len(made.edit.deltas) == len(names)


def test_lora_leaves_random_numbers_as_they_were(tiny_model: Any, capitals: Behavior) -> None:
    torch.manual_seed(5)
    wanted_next = torch.rand(3)
    torch.manual_seed(5)
    act("lora", tiny_model, capitals, steps=1)
    assert torch.equal(torch.rand(3), wanted_next)


def test_dpo_loss_is_its_formula() -> None:
    random = np.random.default_rng(0)
    chosen, rejected, was_chosen, was_rejected = (random.normal(size=6) for _ in range(4))
    beta = 0.3
    plain = [
        -math.log(1 / (1 + math.exp(-beta * ((a - c) - (b - d)))))
        for a, b, c, d in zip(chosen, rejected, was_chosen, was_rejected, strict=True)
    ]
    found = preference_loss(*(torch.tensor(x) for x in (chosen, rejected, was_chosen, was_rejected)), beta)
    np.testing.assert_allclose(found.numpy(), plain, rtol=1e-12)


def test_dpo_begins_at_log_two_and_prefers_the_wanted_side(tiny_model: Any, capitals: Behavior) -> None:
    made = act("dpo", tiny_model, capitals, steps=1, batch=64, lr=1e-5)
    assert made.config["watched"] == pytest.approx(math.log(2), rel=1e-4)
    assert made.passes == 4 * len(wanted(tiny_model, capitals, Goal()))


def test_examples_are_prompts_with_the_wanted_side(tiny_model: Any, capitals: Behavior) -> None:
    frame = capitals.train.bind(tiny_model).frame
    for side, found in (
        ("answers", wanted(tiny_model, capitals, Goal())),
        ("foils", wanted(tiny_model, capitals, Goal(direction="lower"))),
        ("foils", unwanted(tiny_model, capitals, Goal())),
    ):
        for row, one in zip(frame.to_dicts(), found, strict=True):
            assert tiny_model.tokenizer.decode(one.ids) == row["prompt"] + row[side][0]
            assert tiny_model.tokenizer.decode(one.ids[: one.start]) == row["prompt"]


def test_draws_show_every_example_before_any_again() -> None:
    order = draws(10, 4, 0)
    seen = [number for _ in range(5) for number in next(order)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:20]) == list(range(10))
    assert next(draws(3, 8, 0)) and len(next(draws(3, 8, 0))) == 3


def test_profile_is_plain_patching(tiny_model64: Any, capitals: Behavior) -> None:
    from headwater.behavior.metrics import logit_diff

    found = profile(tiny_model64, capitals, ("mlp_out",), "country", n=6)
    apart, total, left = 0.0, 0.0, 6
    layer = tiny_model64.hf.model.layers[1].mlp
    for group in capitals.train.bind(tiny_model64).groups:
        some = group[:left]
        left -= len(some)
        for row in range(len(some)):
            held: list[Tensor] = []
            place = int(some.positions["country"][row])
            hook = layer.register_forward_hook(lambda _m, _i, out, held=held: held.append(out.clone()))
            with torch.no_grad():
                clean = tiny_model64.hf(some.clean[row : row + 1]).logits[:, -1]
            hook.remove()

            def put(_m: Any, _i: Any, out: Tensor, held: Any = held, place: int = place) -> Tensor:
                out = out.clone()
                out[:, place] = held[0][:, place]
                return out

            with torch.no_grad():
                corrupt = tiny_model64.hf(some.corrupt[row : row + 1]).logits[:, -1]
                hook = layer.register_forward_hook(put)
                patched = tiny_model64.hf(some.corrupt[row : row + 1]).logits[:, -1]
                hook.remove()
            ends = some.answers[row : row + 1], some.foils[row : row + 1]
            start = float(logit_diff(corrupt, *ends))
            apart += float(logit_diff(clean, *ends)) - start
            total += float(logit_diff(patched, *ends)) - start
    assert found["mlp_out.1"] == pytest.approx(total / apart, rel=1e-9)


def test_parts_are_those_that_restore_most(tiny_model64: Any, capitals: Behavior) -> None:
    by = profile(tiny_model64, capitals, ("mlp_out",), "country")
    assert lookup_parts(tiny_model64, capitals, 2) == sorted(by, key=lambda name: -by[name])[:2]
    every = profile(tiny_model64, capitals)
    assert output_parts(tiny_model64, capitals, 1) == [max(every, key=lambda name: every[name])]
    with pytest.raises(MethodError, match="no such position"):
        profile(tiny_model64, capitals, position="nowhere")
    with pytest.raises(MethodError, match="subject"):
        lookup_parts(tiny_model64, hw.behavior("greater_than", n=8))


def test_the_mechanism_before_and_after(tiny_model: Any, capitals: Behavior) -> None:
    made = act("finetune", tiny_model, capitals, steps=10, lr=5e-3, weights="m1")
    table = before_after(tiny_model, made, capitals)
    assert table["before"].to_list() == [profile(tiny_model, capitals)[part] for part in table["part"]]
    assert (table["change"].abs() > 0).any() and -1 <= kept(table) <= 1
    seen: list[str] = []

    def mechanism(model: Any) -> dict[str, float]:
        seen.append(model.fingerprint)
        return {"m1": float(len(seen)), "m0": 1.0}

    table = before_after(tiny_model, made, capitals, mechanism)
    assert len(set(seen)) == 2 and table.filter(table["part"] == "m1")["change"].item() == 1.0


def test_all_of_them_are_registered_and_say_what_they_do() -> None:
    for name in ("finetune", "localized", "lora", "dpo", "ascent", "difference", "rmu"):
        told = methods.described(name)
        assert told["what"] and told["known failure"] and "weights" in told["options"]


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"lr": 0.0}, {"batch": 0}, {"until": -1}, {"rank": 0}, {"alpha": 0}, {"goal": "sideways"}]
)
def test_misfit_options_are_refused(tiny_model: Any, capitals: Behavior, options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        act("lora", tiny_model, capitals, **options)


@pytest.mark.parametrize(
    ("name", "option"),
    [("cbft", "until"), ("cbft", "keep_weight"), ("dpo", "keep_weight"), ("reweighted", "keep_weight")],
)
def test_no_option_is_taken_that_does_nothing(name: str, option: str, tiny_model: Any, capitals: Behavior) -> None:
    with pytest.raises(MethodError, match="unknown option"):
        act(name, tiny_model, capitals, **{option: 1.0})


def test_a_loss_that_is_not_finite_says_so(tiny_model: Any) -> None:
    before, updated = state_of(tiny_model), []
    for at in (0, 2):  # at the first step, and after sound ones

        def later(twin: nn.Module, step: int, at: int = at) -> Iterator[tuple[Tensor, float | None]]:
            updated.append(step)
            weight = twin.get_input_embeddings().weight  # type: ignore[operator]
            yield (weight.square().sum() if step < at else weight.sum() * float("nan")), 0.0

        updated.clear()
        with pytest.raises(MethodError, match=f"the loss is not finite. Got: step {at}.*Lower lr"):
            fit(tiny_model, weights_of(tiny_model, "embed"), later, steps=5, lr=1e-3)
        assert updated == list(range(at + 1)) and same_bits(state_of(tiny_model), before)


def test_a_mask_leaves_the_rest_at_zero() -> None:
    weights = Weights(parts={"w": (1, torch.tensor([2, 0]))}, told=("w",))
    masked = weights.mask("w", torch.ones(2, 4))
    assert masked.tolist() == [[1, 0, 1, 0]] * 2
    (delta,) = weights.deltas(
        {"w": nn.Parameter(torch.zeros(2, 4))}, {"w": nn.Parameter(torch.tensor([[1.0, 0, 2, 0], [3, 0, 4, 0]]))}
    )
    assert isinstance(delta, Delta) and delta.value().tolist() == [[2, 1], [4, 3]]
