"""Unlearning, and the attacks that find out whether it has: each against its plain definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.act import Action, prompt
from headwater.act.action import Goal
from headwater.act.catalog import act
from headwater.act.edit import Edit
from headwater.act.measuring import NOTHING, score
from headwater.act.training.examples import unwanted, wanted
from headwater.act.training.finetune import Answering, TrainingConfig
from headwater.act.training.fitting import fit, twin_of
from headwater.act.training.weights import weights_of
from headwater.act.unlearning.latent import _ridge, lens, most, probe
from headwater.act.unlearning.relearning import relearn
from headwater.act.unlearning.rmu import stream
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError


@pytest.fixture(scope="module")
def capitals() -> Behavior:
    return hw.behavior("capitals", n=16, seed=0)


@pytest.fixture(scope="module")
def keep() -> Behavior:
    return hw.behavior("greater_than", n=12, seed=0)


@pytest.fixture(scope="module")
def taught(tiny_model: Any, capitals: Behavior) -> Any:
    """A tiny model that has learned the training pairs, as a model of its own."""
    import copy

    made = act("finetune", tiny_model, capitals, steps=40, lr=1e-2, until=0.02)
    with made.on(tiny_model):
        return hw.load(copy.deepcopy(tiny_model.hf), tokenizer=tiny_model.tokenizer)


def loss(model: Any, action: Action, behavior: Behavior) -> float:
    """Mean surprisal of the answers' first tokens."""
    found = score(model, behavior.train.bind(model), action, ["prob"])["prob"].to_numpy()
    return float(-torch.tensor(found).log().mean())


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.hf.state_dict().items()}


@pytest.mark.parametrize("name", ["ascent", "difference", "rmu"])
@pytest.mark.parametrize("weights", ["all", "lookup:1", "output:2"])
def test_answers_are_forgotten_and_come_back_to_the_bit(
    taught: Any, capitals: Behavior, keep: Behavior, name: str, weights: str
) -> None:
    before = state_of(taught)
    options: dict[str, Any] = {} if name == "ascent" else {"keep": keep}
    rate = {"ascent": 5e-3, "difference": 5e-3, "rmu": 2e-2}[name]
    made = act(name, taught, capitals, steps=25, lr=rate, weights=weights, **options)
    assert made.goal == Goal(direction="lower")
    assert loss(taught, made, capitals) > loss(taught, NOTHING, capitals) + 1.0
    assert all(torch.equal(value, before[key]) for key, value in taught.hf.state_dict().items())
    if weights != "all":
        layers = {part.split(".")[1] for part in made.config["parts"]}
        assert {name.split(".")[2] for name in made.edit.parameters} <= layers


def test_what_is_kept_stays(taught: Any, capitals: Behavior, keep: Behavior) -> None:
    lost = {
        name: loss(taught, act(name, taught, capitals, steps=20, lr=5e-3, until=50.0, **given), keep)
        for name, given in (("ascent", {}), ("difference", {"keep": keep}))
    }
    assert lost["difference"] < lost["ascent"] - 1.0


def test_ascent_stops_when_it_is_enough(taught: Any, capitals: Behavior) -> None:
    made = act("ascent", taught, capitals, steps=200, lr=5e-3, until=5.0)
    assert made.config["updates"] < 200 and -made.config["watched"] >= 5.0


def test_stream_is_the_captured_one_and_nothing_above_runs(tiny_model: Any) -> None:
    ids = tiny_model.tokens("The capital of France is")[0][None]
    ran: list[int] = []
    twin = twin_of(tiny_model.hf)
    twin.model.layers[2].register_forward_hook(lambda *_: ran.append(2))  # type: ignore[union-attr,index]
    with torch.no_grad():
        found = stream(twin, tiny_model.anatomy.main.blocks[1].name, ids)
    assert torch.equal(found, tiny_model.run(ids, capture="resid_post.1", logits="none")["resid_post.1"])
    assert not ran


def test_rmu_turns_the_stream_where_it_is_read_and_leaves_what_is_kept(
    tiny_model: Any, capitals: Behavior, keep: Behavior
) -> None:
    made = act("rmu", tiny_model, capitals, keep=keep, steps=60, lr=1e-2, layer=1, keep_weight=5.0)
    assert {name.split(".")[2] for name in made.edit.parameters} == {"0", "1"}

    def held(behavior: Behavior) -> Tensor:
        ids = wanted(tiny_model, behavior, Goal())[0].ids[None]
        return tiny_model.run(ids, capture="resid_post.1", logits="none")["resid_post.1"][0, 1:]

    before = {one.name: held(one) for one in (capitals, keep)}
    with made.on(tiny_model):
        after = {one.name: held(one) for one in (capitals, keep)}
    moved = {name: float((after[name] - before[name]).norm() / before[name].norm()) for name in before}
    assert moved["capitals"] > 3 * moved["greater_than"]
    rows = after["capitals"] / after["capitals"].norm(dim=-1, keepdim=True)
    was = before["capitals"] / before["capitals"].norm(dim=-1, keepdim=True)
    assert (rows @ rows.T).mean() > (was @ was.T).mean() + 0.1  # one direction for all of them


def test_relearning_brings_it_back(taught: Any, capitals: Behavior) -> None:
    before = state_of(taught)
    made = act("difference", taught, capitals, steps=25, lr=5e-3)
    table = relearn(taught, made, capitals, steps=(3, 12), lr=5e-3)
    assert table["step"].to_list() == [0, 0, 3, 3, 12, 12] and table["part"].to_list() == ["trained", "held"] * 3
    trained = table.filter(table["part"] == "trained")
    assert trained["metric"].to_list()[-1] > trained["metric"].to_list()[0] + 1.0
    n = capitals.train.bind(taught).n
    assert trained["n"][0] <= round(0.4 * capitals.train.n) and table["n"][:2].sum() == n
    with made.on(taught):
        found = score(taught, capitals.train.bind(taught), NOTHING, ["accuracy"])["accuracy"].sum()
    assert (table["accuracy"] * table["n"])[:2].sum() == pytest.approx(found)
    assert all(torch.equal(value, before[key]) for key, value in taught.hf.state_dict().items())


def test_relearning_turns_back_a_goal_of_two_directions(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=24, seed=0)
    made = act("finetune", tiny_model, ioi, goal="order=ABBA", steps=25, lr=5e-3)
    first = ioi.train[: round(0.4 * ioi.train.n)]
    bound = first.bind(tiny_model)
    signs = made.goal.signs(bound.frame, part=True)
    assert len(set(signs)) == 2
    table = relearn(tiny_model, made, ioi, steps=(15,), lr=5e-3)
    trained = table.filter(table["part"] == "trained")["metric"].to_list()
    # both sides move back: by the metric's mean alone they would cancel, so ask pair by pair
    with made.on(tiny_model):
        found = fit(
            tiny_model, weights_of(tiny_model, "all"),
            Answering(unwanted(tiny_model, first, made.goal, part=True), [], TrainingConfig(), "cpu"),
            steps=15, lr=5e-3,
        )  # fmt: skip
        with Edit.of(tiny_model, "back", found.deltas).applied(tiny_model):
            after = score(tiny_model, bound, NOTHING, ["logit_diff"])["logit_diff"].mean()
    assert trained[-1] == pytest.approx(after, rel=1e-5)


def test_relearning_attacks_weights_only(taught: Any, capitals: Behavior) -> None:
    with pytest.raises(MethodError, match="changes no weights"):
        relearn(taught, prompt(taught, capitals, "lower"), capitals)
    made = act("ascent", taught, capitals, steps=2, lr=1e-3)
    with pytest.raises(MethodError, match="pairs"):
        relearn(taught, made, capitals.train[:1])
    with pytest.raises(MethodError, match="step"):
        relearn(taught, made, capitals, steps=())


def test_the_lens_ends_in_what_the_model_says(taught: Any, capitals: Behavior) -> None:
    table = lens(taught, NOTHING, capitals.train)
    found = score(taught, capitals.train.bind(taught), NOTHING, ["accuracy"])["accuracy"].mean()
    assert table["layer"].to_list() == [0, 1, 2] and table["accuracy"][-1] == pytest.approx(found)
    # by hand, at the first layer: the last norm and the unembedding
    right = 0
    for group in capitals.train.bind(taught).groups:
        held = taught.run(group.clean, capture="resid_post.0@-1", logits="none")["resid_post.0@-1"]
        with torch.no_grad():
            said = taught.hf.lm_head(taught.hf.model.norm(held))
        right += int((said.gather(1, group.answers) > said.gather(1, group.foils)).sum())
    assert table["accuracy"][0] == pytest.approx(right / capitals.train.bind(taught).n)
    assert most(table) == table["accuracy"].max()
    other = lens(taught, NOTHING, capitals.train, side="foils")
    assert (other["accuracy"] + table["accuracy"]).to_list() == pytest.approx([1.0] * 3)


def test_ridge_is_its_primal_form() -> None:
    x = torch.randn(6, 20, dtype=torch.float64)
    scale = x.square().mean(0).sqrt()
    z = x / scale
    plain = torch.linalg.solve(z.T @ z + 0.5 * 6 * torch.eye(20, dtype=x.dtype), z.sum(0)) / scale
    torch.testing.assert_close(_ridge(x, 0.5), plain)


def test_a_probe_reads_what_is_planted(tiny_model: Any) -> None:
    """Right and wrong answers that differ in one word: a probe tells them on facts it has not seen."""
    words = [
        "France",
        "Germany",
        "Italy",
        "Spain",
        "Japan",
        "China",
        "Egypt",
        "Peru",
        "Chile",
        "Kenya",
        "Norway",
        "Poland",
    ]
    rows = [
        {
            "prompt": f"The capital of {one} is",
            "counterfactual": f"The capital of {words[at - 1]} is",
            "answers": [" Paris"],
            "foils": [" Rome"],
            "split": "train",
        }
        for at, one in enumerate(words)
    ]  # fmt: skip
    known, asked = Behavior.from_rows(rows[:9]), Behavior.from_rows(rows[9:])
    table = probe(tiny_model, NOTHING, asked, known)
    assert table["accuracy"].to_list() == [1.0] * 3 and table["known"].to_list() == [1.0] * 3
    assert most(probe(tiny_model, NOTHING, asked, known, side="foils")) == 0.0
    with pytest.raises(MethodError, match="known"):
        probe(tiny_model, NOTHING, asked, known[:2])


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"until": 0}, {"goal": "place=1"}, {"lr": -1}, {"keep_weight": -1.0}, {"nothing": 1}]
)
@pytest.mark.parametrize("name", ["difference", "rmu"])
def test_misfit_options_are_refused(tiny_model: Any, capitals: Behavior, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        act(name, tiny_model, capitals, **options)
    with pytest.raises(MethodError, match="layer"):
        act("rmu", tiny_model, capitals, layer=7)
