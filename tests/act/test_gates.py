"""Gates: what they scale is what hooks on the heads scale, gradients are those of the loss, only gates are trained."""

from typing import Any

import pytest
import torch
from torch import nn

import headwater as hw
import localize_families
import tiny
from headwater.act.action import Goal
from headwater.act.catalog import act, methods
from headwater.act.edit import Edit
from headwater.act.editing.parts import Matrix
from headwater.act.editing.repair import scaled_heads
from headwater.act.measuring import NOTHING, score
from headwater.act.training.examples import batches, mean_loss, wanted
from headwater.act.training.fitting import twin_of
from headwater.act.training.gates import GatesConfig, _deltas, _gates, _scaled
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

FAMILIES = ["llama", "gpt2", "neox", "gptj", "phi3", "gemma3", "olmo2", "opt"]


@pytest.fixture(scope="module")
def capitals() -> Behavior:
    return hw.behavior("capitals", n=24, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", ["heads", "mlps", "both"])
def test_while_they_are_learned_gates_do_what_their_edit_does(family: str, parts: str) -> None:
    model = localize_families.make(family)
    if parts != "heads" and family in ("gemma3", "olmo2"):
        with pytest.raises(MethodError, match="a norm behind each MLP"):
            _gates(model, GatesConfig(parts=parts))  # type: ignore[arg-type]
        return
    held = _gates(model, GatesConfig(parts=parts))  # type: ignore[arg-type]
    values = torch.rand(len(held), generator=torch.Generator().manual_seed(0)) * 2
    ids = torch.arange(3, 9)[None]
    twin = twin_of(model.hf)
    plain = twin(input_ids=ids).logits
    with _scaled(twin, held, values.to(plain)):
        gated = twin(input_ids=ids).logits
    with Edit.of(model, "gates", _deltas(held, values)).applied(model):
        edited = model.hf(input_ids=ids).logits
    assert torch.allclose(gated, edited, atol=1e-5 * float(plain.abs().max()))
    assert float((gated - plain).abs().max()) > 1e-3
    assert torch.equal(twin(input_ids=ids).logits, plain)  # the hooks are gone


def test_the_gradient_of_a_gate_is_that_of_its_heads_scale(tiny_model64: Any, capitals: Behavior) -> None:
    model = tiny_model64
    held = _gates(model, GatesConfig())
    assert [gate.name for gate in held] == [f"a{layer}.h{head}" for layer in range(3) for head in range(4)]
    values = nn.Parameter(torch.ones(len(held), dtype=torch.float64))
    some = wanted(model, capitals, Goal())[:3]

    def loss(hf: nn.Module) -> torch.Tensor:
        parts = [mean_loss(hf, ids, there).sum() for _, ids, there in batches(some, [0, 1, 2], "cpu")]
        return torch.stack(parts).sum()

    with _scaled(twin := twin_of(model.hf), held, values):
        loss(twin).backward()
    assert values.grad is not None
    step = 1e-3  # Llama's norms are in single precision, whatever the model is in
    for at, (layer, head) in ((0, (0, 0)), (6, (1, 2)), (11, (2, 3))):
        sides = []
        for factor in (1 + step, 1 - step):
            edit = Edit.of(model, "one head", scaled_heads(model, {(layer, head): factor}))
            with edit.applied(model), torch.no_grad():
                sides.append(float(loss(model.hf)))
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(values.grad[at]), rel=2e-3, abs=1e-4)


def test_gates_reach_their_goal_and_are_undone_to_the_bit(tiny_model: Any, capitals: Behavior) -> None:
    before = {name: value.clone() for name, value in tiny_model.hf.state_dict().items()}
    train = capitals.train.bind(tiny_model)
    was = score(tiny_model, train, NOTHING, ["logit_diff"])["logit_diff"].mean()
    changes = []
    for goal, sign in (("raise", 1.0), ("lower", -1.0)):
        made = act("gates", tiny_model, capitals, goal=goal, steps=25, parts="both", keep="capitals")
        assert made.edit is not None and made.control is not None and made.passes >= 25 * 8
        assert all(value >= 0 for value in made.config["gates"].values()) and len(made.config["gates"]) > 10
        now = score(tiny_model, train, made, ["logit_diff"])["logit_diff"].mean()
        changes.append(sign * (float(now) - float(was)))  # type: ignore[arg-type]
        assert all(torch.equal(value, before[name]) for name, value in tiny_model.hf.state_dict().items())
    assert min(changes) > 0.3
    changed = {delta.parameter for delta in made.edit.deltas}
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)


def test_only_the_farthest_are_fitted_again(tiny_model: Any, capitals: Behavior) -> None:
    every = act("gates", tiny_model, capitals, steps=6).config["gates"]
    few = act("gates", tiny_model, capitals, steps=6, top=2).config["gates"]
    assert set(few) == set(sorted(every, key=lambda name: -abs(every[name] - 1))[:2])
    alone = act("gates", tiny_model, capitals, steps=6, heads=tuple(few)).config["gates"]
    assert alone == few  # they start from 1 again, as if there had been no others
    costly = act("gates", tiny_model, capitals, steps=6, sparsity=50.0).config["gates"]
    assert sum(abs(v - 1) for v in costly.values()) < sum(abs(v - 1) for v in every.values())


def test_gates_of_gpt2_whose_matrices_are_transposed(capitals: Behavior) -> None:
    model = hw.load(tiny.tiny_gpt2(torch.float64), tokenizer=tiny.tiny_tokenizer())
    held = _gates(model, GatesConfig(heads=("a1.h2",)))
    assert isinstance(held[0].matrix, Matrix) and held[0].matrix.flipped
    (delta,) = _deltas(held, torch.tensor([0.0]))
    columns = held[0].columns
    assert columns is not None
    with Edit.of(model, "shut", [delta]).applied(model):
        assert float(held[0].matrix.weight[:, columns].abs().max()) == 0.0
        assert float(held[0].matrix.weight.abs().max()) > 0


@pytest.mark.parametrize(
    "options", [{"sparsity": -1}, {"top": 0}, {"parts": "tails"}, {"heads": ("a9.h9",)}, {"lr": 0}]
)
def test_misfit_options_are_refused(tiny_model: Any, capitals: Behavior, options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        act("gates", tiny_model, capitals, **options)
    told = methods.described("gates")
    assert told["what"] and told["known failure"] and "sparsity" in told["options"]
