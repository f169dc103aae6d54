"""Votes against the model's own logits; tables against votes made by hand; a planted faulty component is found and
damped.
"""

import math

import polars as pl
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import headwater as hw
from headwater.behavior.generators.parentheses import CALLS, THINGS
from headwater.core.errors import MethodError
from headwater.core.results import load_result
from headwater.localize.catalog import methods
from headwater.localize.comparing.interference import (
    InterferenceConfig,
    components,
    interference,
    names_of,
    scaled_margins,
)
from headwater.localize.comparing.votes import Voter, Votes, collect
from headwater.localize.engine.passes import Engine, make_batches
from localize_families import bound, make, pairs
from tiny import tiny_gpt2, tiny_llama

CLOSERS = [")" * k for k in range(1, 7)]


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, a sign, or a run of closers."""
    words = dict.fromkeys(["<unk>", "\n", "(", *"+,-*/|", "print", *CLOSERS, *CALLS, *THINGS])
    backend = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\)+|\w+|[^\w)]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="module")
def closers():
    return hw.behavior("parentheses", n=48, seed=0, shots=0)


def engine_and_batches(model, behavior):
    return Engine(model), make_batches(behavior.bind(model), 10_000, reuse_prefix=False)


@pytest.mark.parametrize("make_hf", [tiny_llama, tiny_gpt2])
def test_votes_add_up_to_the_models_own_margin(make_hf, tokenizer, closers) -> None:
    model = hw.load(make_hf(torch.float64, vocab_size=len(tokenizer)), tokenizer=tokenizer)
    engine, batches = engine_and_batches(model, closers)
    votes = collect(Voter(engine), batches, "votes")
    own = torch.cat([scaled_margins(engine, batch, {}) for batch in batches])
    order = sorted(range(len(own)), key=[row for batch in batches for row in batch.rows].__getitem__)
    torch.testing.assert_close(votes.total, own[order], rtol=1e-6, atol=1e-6)
    rest = votes.total - votes.margins.sum(dim=0)
    # what is left over is what biases add: the same for one candidate pair, nothing where a model has none
    if make_hf is tiny_llama:
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "olmo2", "granite"])
def test_a_components_vote_is_its_write_through_the_frozen_norm(name) -> None:
    model = make(name)
    group = pairs(3, 6, 0)
    engine = Engine(model)
    voter = Voter(engine)
    (batch,) = make_batches(bound(group), 1000, reuse_prefix=False)
    seen, directions, whole, _tokens = voter.batch(batch)
    writes = voter.writes(seen)
    # all writes and the biases of attention together are the final stream, so votes differ from the whole by biases
    final = seen.final[:, -1].double()
    left = final - writes.sum(dim=0)
    again = torch.einsum("cbd,bkd->bk", writes, directions) + torch.einsum("bd,bkd->bk", left, directions)
    shift = engine.wiring.final_norm
    bias = getattr(shift, "bias", None)
    if bias is not None:
        again = again + torch.einsum(
            "d,bkd->bk", bias.double(), model.hf.get_output_embeddings().weight[_tokens.clamp(min=0)].double()
        )
    if (extra := getattr(model.hf.get_output_embeddings(), "bias", None)) is not None:
        again = again + extra.double()[_tokens.clamp(min=0)]
    torch.testing.assert_close(again, whole, rtol=1e-7, atol=1e-7)
    # a head's write, by hand: run with and without its values in the output projection
    layer, head = 1, 2
    attention = engine.wiring.layers[layer].attention
    z = seen.z[layer][:, -1].double()
    width = attention.d_value
    only = torch.zeros_like(z)
    only[:, head * width : (head + 1) * width] = z[:, head * width : (head + 1) * width]
    if engine.wiring.layers[layer].post_norm.module is None:
        with torch.no_grad():
            by_hand = attention.out_proj(only) - attention.out_proj(torch.zeros_like(z))
        at = engine.wiring.graph.source(f"a{layer}.h{head}")
        torch.testing.assert_close(writes[at], by_hand * attention.write.scale, rtol=1e-9, atol=1e-9)


def test_neurons_add_up_to_their_mlp(tokenizer, closers) -> None:
    model = hw.load(tiny_llama(torch.float64, vocab_size=len(tokenizer)), tokenizer=tokenizer)
    engine, batches = engine_and_batches(model, closers[:8])
    every = 3 * 48
    votes = collect(Voter(engine), batches, "votes", neurons=every)
    assert len(votes.neurons) == every
    names = names_of(Voter(engine), votes)
    for layer in range(3):
        rows = [i for i, name in enumerate(names) if name.startswith(f"m{layer}.n")]
        whole = votes.margins[names.index(f"m{layer}")]
        torch.testing.assert_close(votes.margins[rows].sum(dim=0), whole, rtol=1e-9, atol=1e-9)


def hand_made(n: int = 40) -> tuple[list[str], Votes]:
    """Two classes in turn: one component always right, one always wrong, one that always says class 1, one that is
    right in turn, one that is mostly right but whose rare mistakes are loud."""
    answers = torch.arange(n) % 2 + 1
    other = 3 - answers
    right = torch.stack([
        torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool), answers == 1,
        torch.arange(n) % 4 < 2, torch.arange(n) % 10 != 0,
    ])  # fmt: skip
    said = torch.where(right, answers, other)
    size = torch.where(right, 1.0, -1.0).double()
    size[1] *= 3
    size[4] = torch.where(right[4], 0.01, -30.0)
    return ["a0.h0", "a0.h1", "m0", "m1", "a1.h0"], Votes(
        margins=size, right=right, said=said, total=size.sum(dim=0), chance=torch.full((n,), 0.5), answers=answers,
        neurons=[],
    )  # fmt: skip


def test_verdicts_of_votes_made_by_hand() -> None:
    names, votes = hand_made()
    table = components(names, votes, q=0.05)
    verdict = dict(table.select("component", "verdict").rows())
    # four loud mistakes in forty are too few to be sure that the votes of a1.h0 go against the answer
    assert verdict == {"a0.h0": "sound", "a0.h1": "faulty", "m0": "mixed", "m1": "mixed", "a1.h0": "sound"}
    names, votes = hand_made(400)
    verdict = dict(components(names, votes, q=0.05).select("component", "verdict").rows())
    assert verdict == {"a0.h0": "sound", "a0.h1": "faulty", "m0": "mixed", "m1": "mixed", "a1.h0": "mixed"}
    # right nine times in ten, but what it says against the answer outweighs the rest: never plainly sound
    assert dict(table.select("component", "accuracy").rows())["a1.h0"] == pytest.approx(0.9)
    assert dict(table.select("component", "margin").rows())["a1.h0"] == pytest.approx(0.9 * 0.01 - 3.0)
    assert table["component"][0] == "a0.h0"
    exact = dict(table.select("component", "p").rows())
    assert exact["a0.h0"] == pytest.approx(2 * 0.5**40)
    assert exact["m0"] == pytest.approx(1.0)


def test_precision_and_recall_by_hand(tiny_model) -> None:
    from headwater.localize.comparing.interference import _classes

    names, votes = hand_made()

    class Named:
        components = names

    table = _classes(Named(), votes, tiny_model)  # type: ignore[arg-type]
    one = tiny_model.tokenizer.decode([1])
    constant = table.filter((pl.col("component") == "m0") & (pl.col("class") == one)).row(0, named=True)
    assert (constant["precision"], constant["recall"], constant["votes"]) == (0.5, 1.0, 40)
    silent = table.filter((pl.col("component") == "m0") & (pl.col("class") != one)).row(0, named=True)
    assert silent["precision"] is None and silent["recall"] == 0.0


def planted(tokenizer):
    """A random model whose last MLP shouts for three closers whatever the depth, louder than all else."""
    hf = tiny_gpt2(torch.float64, vocab_size=len(tokenizer), n_layer=2, tie_word_embeddings=False)
    loud = hf.lm_head.weight[tokenizer.convert_tokens_to_ids(")))")].detach()
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_proj.bias.copy_(loud / loud.norm() * 40)
    return hw.load(hf, tokenizer=tokenizer)


def test_a_faulty_component_that_was_planted_is_found_and_damped(tokenizer, closers, tmp_path) -> None:
    model = planted(tokenizer)
    closers = hw.behavior("parentheses", n=160, seed=0, shots=0)
    result = interference(model, closers, draws=4, top=3)
    assert "m1" in result.of("faulty")
    assert result.facts["failing"] > 0
    sums = {(r["outcome"], r["group"]): r["margin"] for r in result.tables["sums"].iter_rows(named=True)}
    assert sums["wrong", "faulty"] < 0 and sums["wrong", "all"] <= 0
    for outcome in ("right", "wrong"):
        parts = sum(sums[outcome, g] for g in ("sound", "faulty", "mixed", "rest"))
        assert parts == pytest.approx(sums[outcome, "all"])
    acted = {r["what"]: r for r in result.tables["intervention"].iter_rows(named=True)}
    assert acted["before"]["p"] is None
    assert acted["damp faulty"]["margin"] > acted["before"]["margin"]
    assert 0.2 - 1e-9 <= acted["damp faulty"]["p"] <= 1
    recall = result.tables["classes"].filter((pl.col("component") == "m1") & (pl.col("class") == ")))"))
    assert recall["recall"][0] == 1.0
    result.save(tmp_path / "r")
    assert load_result(tmp_path / "r").content_hash == result.content_hash


def test_scaling_is_what_an_intervention_on_the_model_gives(tokenizer, closers) -> None:
    model = hw.load(tiny_llama(torch.float64, vocab_size=len(tokenizer)), tokenizer=tokenizer)
    engine, (batch, *_) = engine_and_batches(model, closers[:6])
    run = model.run(batch.clean, capture=["z.1.h2@-1"], logits="none")
    patched = [hw.replace("z.1.h2@-1", run["z.1.h2@-1"] * 3)]
    run = model.run(batch.clean, capture=["mlp_out.2@-1"], logits="none", interventions=patched)
    patched.append(hw.replace("mlp_out.2@-1", run["mlp_out.2@-1"] * 0.5))
    logits = model.run(batch.clean, logits="last", interventions=patched).logits
    foils = logits.gather(1, batch.foils.clamp(min=0)).masked_fill(batch.foils < 0, -math.inf).amax(dim=1)
    expected = logits.gather(1, batch.answers)[:, 0] - foils
    found = scaled_margins(engine, batch, {"a1.h2": 3.0, "m2": 0.5})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with engine.open():
        past = engine.cache(batch.clean[:, :-1])
    found = scaled_margins(engine, batch, {"a1.h2": 3.0, "m2": 0.5}, past=past)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_it_is_a_method_by_name_and_refuses_what_it_cannot_read(tiny_model) -> None:
    assert methods.get("interference") is interference
    with pytest.raises(MethodError, match="unknown option"):
        interference(tiny_model, hw.behavior("ioi", n=4), tops=3)
    with pytest.raises(MethodError, match="at least one"):
        InterferenceConfig(draws=0)
    with pytest.raises(MethodError, match="votes are logits"):
        interference(tiny_model, hw.behavior("ioi", n=4), metric="kl")
    no_foils = hw.Behavior.from_rows([{"prompt": "The dog", "counterfactual": "The cat", "answer": " is"}] * 1)
    with pytest.raises(MethodError, match="foils"):
        interference(tiny_model, no_foils)
