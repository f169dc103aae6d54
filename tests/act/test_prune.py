"""Pruning by relevance: against autograd and hooks by hand, in float64."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import headwater as hw
from headwater.act.catalog import act
from headwater.act.editing.prune import magnitude, prune, pruning_curve, relevance, taken, text_relevance
from headwater.act.measuring import NOTHING, score
from headwater.core.errors import MethodError


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=24, seed=0)


def test_relevance_is_activation_times_gradient(tiny_model64: Any, ioi: Any) -> None:
    model, bound = tiny_model64, ioi.train.bind(tiny_model64)
    total, kept = torch.zeros(model.n_layers, 48, dtype=torch.float64), {}
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args, layer=layer: kept.__setitem__(layer, args[0]))
        for layer, block in enumerate(model.hf.model.layers)
    ]
    for group in bound.groups:
        logits = model.hf(group.clean).logits[:, -1]
        for row in range(len(group.rows)):
            answers, foils = (x[row][x[row] >= 0] for x in (group.answers, group.foils))
            said = logits[row, answers].mean() - logits[row, foils].mean()
            grads = torch.autograd.grad(said, [kept[layer] for layer in range(model.n_layers)], retain_graph=True)
            total += torch.stack([(kept[layer] * g).abs().sum((0, 1)) for layer, g in enumerate(grads)]).detach()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(relevance(model, bound, "logit_diff"), total / bound.n, rtol=1e-8, atol=1e-12)
    # text: of the mean loss of each text; magnitude: mean activation times the length of what it writes
    texts, text_total, sizes = ["A short text.", "Another one, a little longer."], torch.zeros_like(total), total * 0
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args, layer=layer: kept.__setitem__(layer, args[0]))
        for layer, block in enumerate(model.hf.model.layers)
    ]
    for text in texts:
        ids = model.tokens(text)[0][None, :5]
        lost = model.hf(ids, labels=ids).loss
        grads = torch.autograd.grad(lost, [kept[layer] for layer in range(model.n_layers)])
        text_total += torch.stack([(kept[layer] * g).abs().sum((0, 1)) for layer, g in enumerate(grads)]).detach()
    for group in bound.groups:
        model.hf(group.clean)
        sizes += torch.stack([kept[layer].abs().mean(1).sum(0) for layer in range(model.n_layers)]).detach()
    for handle in handles:
        handle.remove()
    # the loss is taken in single precision, as the model's own is
    torch.testing.assert_close(text_relevance(model, texts, 5), text_total / 2, rtol=1e-4, atol=1e-9)
    lengths = torch.stack([block.mlp.down_proj.weight.norm(dim=0) for block in model.hf.model.layers]).detach()
    torch.testing.assert_close(magnitude(model, bound), sizes / bound.n * lengths, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("model_name", ["tiny_model64", "tiny_gpt2_model64"])
def test_pruned_neurons_write_nothing_and_come_back(model_name: str, ioi: Any, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(model_name)
    before = {name: weight.clone() for name, weight in model.hf.state_dict().items()}
    made = prune(model, ioi, share=0.25)
    assert made.edit is not None
    ranked = relevance(model, ioi.train[:24].bind(model), "logit_diff")
    chosen = taken(ranked, 0.25, "least")
    assert sum(map(len, chosen.values())) == round(0.25 * ranked.numel())
    off = {(layer, int(neuron)) for layer, index in chosen.items() for neuron in index}
    assert max(float(ranked[at]) for at in off) <= min(
        float(ranked[at]) for at in np.ndindex(*ranked.shape) if at not in off
    )
    ids = torch.tensor([[5, 17, 40, 8, 99, 3]])
    edits = []
    for layer, index in chosen.items():
        mask = torch.ones(ranked.shape[1], dtype=torch.float64)
        mask[index] = 0
        from headwater.act.ablation import Scale

        edits.append(Scale(site=hw.Site.parse(f"neurons.{layer}"), op="add", value=torch.zeros(()), scale=mask))  # type: ignore[arg-type]
    wanted = model.run(ids, interventions=edits).logits
    with made.edited(model) as rest:
        assert not rest.interventions
        torch.testing.assert_close(model.run(ids).logits, wanted, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.state_dict().items())


def test_text_that_the_tokenizer_has_no_words_for_ranks_nothing(ioi: Any) -> None:
    import localize_families
    import tiny

    model = localize_families.make("llama")
    model.tokenizer = tiny.word_tokenizer(61)
    row = {"prompt": "w3 w7 w9 w5", "counterfactual": "w3 w8 w9 w5", "answer": " w20", "foil": " w21", "split": "train"}
    behavior = hw.Behavior.from_rows([row], name="made")
    assert prune(model, behavior, share=0.1).edit is not None
    with pytest.raises(MethodError, match="lacks words"):
        prune(model, behavior, share=0.1, text=True)


def test_the_most_relevant_neurons_matter_more_than_the_least(tiny_model: Any, ioi: Any) -> None:
    usual = score(tiny_model, ioi.train.bind(tiny_model), NOTHING, ["logit_diff"])["logit_diff"].to_numpy()
    moved = {}
    for take in ("least", "most"):
        made = act("prune", tiny_model, ioi, share=0.1, take=take)
        now = score(tiny_model, ioi.train.bind(tiny_model), made, ["logit_diff"])["logit_diff"].to_numpy()
        moved[take] = float(np.abs(now - usual).mean())
        random = made.control(1) if made.control is not None else None
        assert random is not None and random.edit is not None and made.edit is not None
        assert random.edit.n_weights(tiny_model) == made.edit.n_weights(tiny_model)
    assert moved["least"] < moved["most"] / 3


def test_the_curve_has_every_ranking(tiny_model: Any, ioi: Any) -> None:
    found = pruning_curve(tiny_model, ioi, shares=(0.1, 0.4), seeds=2, n=8)
    table = found.to_frame()
    assert table.height == 6
    assert set(table["by"]) == {"relevance", "magnitude", "random"}
    random = table.filter(pl.col("by") == "random")
    assert (random["lo"] <= random["metric"]).all() and (random["metric"] <= random["hi"]).all()
    assert found.chart() is not None
    with pytest.raises(MethodError, match="a share of the neurons"):
        pruning_curve(tiny_model, ioi, shares=(1.5,), seeds=1)
