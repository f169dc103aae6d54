"""Edits of weights: closed forms against numpy, and plain definitions, in float64 on tiny models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import headwater as hw
import localize_families
import tiny
from headwater.act.action import Action
from headwater.act.applying import applied
from headwater.act.catalog import act, described, methods
from headwater.act.edit import Edit
from headwater.act.editing.closed import insert, least_squares, ridged
from headwater.act.editing.facts import FactConfig, read_facts, subject_inputs
from headwater.act.editing.moments import second_moments
from headwater.act.editing.orthogonalize import without
from headwater.act.editing.parts import (
    down_projection,
    head_columns,
    mlp_of,
    out_projection,
    writes_directly,
    written,
)
from headwater.act.editing.repair import helping, scaled_heads
from headwater.act.editing.rewrites import rewrites
from headwater.act.editing.values import said_by_neurons
from headwater.act.measuring import NOTHING, score
from headwater.act.steering.choosing import Task
from headwater.core.errors import MethodError
from headwater.core.interventions import project_out, replace

DIRECT = ["llama", "gpt2", "neox", "gptj", "phi", "opt", "granite"]
ALL = ["rome", "memit", "rank_one", "head_projection", "value_vectors", "repair", "orthogonalize", "recalibrate"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    make = {"llama": tiny.tiny_llama, "gpt2": tiny.tiny_gpt2}[request.param]
    return hw.load(make(torch.float64), tokenizer=tiny.tiny_tokenizer())


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=24, seed=0)


def options(method: str, tmp_path: Path) -> dict[str, Any]:
    if method in ("rome", "memit"):
        layers = {"layer": 1} if method == "rome" else {"layers": (0, 1)}
        return {"subject": "S2", "facts": 2, "steps": 12, "cache": str(tmp_path), **layers}
    return {"n": 5, "max_perplexity": 1e9} | ({"cache": str(tmp_path)} if method == "rank_one" else {})


def behavior_for(method: str, ioi: Any) -> Any:
    return hw.behavior("colors", n=48, seed=0, format="choice") if method == "recalibrate" else ioi


# --- closed forms -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(2, 9), n_out=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_an_inserted_key_maps_exactly_and_others_move_least(n_in: int, n_out: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    others = torch.randn(4 * n_in, n_in, generator=draw, dtype=torch.float64)
    key = torch.randn(n_in, generator=draw, dtype=torch.float64)
    change = torch.randn(n_out, generator=draw, dtype=torch.float64)
    moment = others.T @ others / len(others)
    left, right = insert(key, change, moment)
    delta = left @ right
    assert torch.allclose(delta @ key, change, atol=1e-9)
    # the least E|delta k|^2 under delta key = change, by numpy's constrained least squares (a KKT system a row)
    c, k = moment.numpy(), key.numpy()
    kkt = np.block([[2 * c, k[:, None]], [k[None], np.zeros((1, 1))]])
    wanted = np.stack([np.linalg.solve(kkt, np.append(np.zeros(n_in), target))[:n_in] for target in change.numpy()])
    assert np.allclose(delta.numpy(), wanted, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(n_in=st.integers(2, 9), n_keys=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_many_keys_are_numpys_least_squares(n_in: int, n_keys: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    others = torch.randn(4 * n_in, n_in, generator=draw, dtype=torch.float64)
    keys = torch.randn(n_in, n_keys, generator=draw, dtype=torch.float64)
    changes = torch.randn(3, n_keys, generator=draw, dtype=torch.float64)
    left, right = least_squares(keys, changes, others.T @ others)
    # old keys shall move by nothing and new ones by their change: one ordinary least-squares problem
    rows = np.concatenate([others.numpy(), keys.numpy().T])
    targets = np.concatenate([np.zeros((len(others), 3)), changes.numpy().T])
    wanted = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    assert np.allclose((left @ right).numpy(), wanted, atol=1e-8)


def test_moments_that_are_zero_are_refused() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(MethodError, match="moments of the keys are zero"):
        ridged(zero, 0.1)
    with pytest.raises(MethodError, match="key is zero"):
        insert(torch.zeros(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64), torch.eye(3).double())
    assert torch.equal(ridged(torch.eye(3).double() * 2, 0.5), torch.eye(3).double() * 3)


# --- moments ----------------------------------------------------------------------------------------------------------


def test_second_moments_are_means_over_tokens_and_kept_on_disk(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The garden near the river was bright in autumn.\n\nA dog and a bird walked along the road.\n")
    found = second_moments(model, [0, 2], text, tokens=11, cache=tmp_path / "cache")
    rows: dict[int, list[Tensor]] = {0: [], 2: []}
    left = 11
    for paragraph in [" ".join(text.read_text().split())]:
        ids = model.tokens(paragraph)[0][: left + 1]
        left -= len(ids) - 1
        run = model.run(ids[None], capture=["neurons.0", "neurons.2"])
        for layer in rows:
            rows[layer].append(run[f"neurons.{layer}"][0, 1:])
    for layer, parts in rows.items():
        keys = torch.cat(parts)
        assert len(keys) == 11
        assert torch.allclose(found[layer], keys.T @ keys / 11, atol=1e-12)
    files = sorted((tmp_path / "cache" / "moments" / model.fingerprint).iterdir())
    assert len(files) == 2
    with monkeypatch.context() as patched:  # what is stored is not measured again
        patched.setattr(type(model), "run", lambda *_a, **_k: pytest.fail("measured again"))
        again = second_moments(model, [2], text, tokens=11, cache=tmp_path / "cache")
    assert torch.equal(again[2], found[2])
    files[1].write_bytes(b"broken")
    assert torch.equal(second_moments(model, [2], text, tokens=11, cache=tmp_path / "cache")[2], found[2])
    name = f"{'transformer.h' if 'GPT2' in type(model.hf).__name__ else 'model.layers'}.0.mlp"
    weight = next(n for n, p in model.hf.named_parameters() if n.startswith(name) and p.ndim == 2)
    shape = dict(model.hf.named_parameters())[weight].shape
    edit = Edit.of(model, "e", [hw.act.Delta.full(weight, torch.randn(shape, dtype=torch.float64))])
    with edit.applied(model):  # another model has moments of its own
        other = second_moments(model, [2], text, tokens=11, cache=tmp_path / "cache")
    assert not torch.allclose(other[2], found[2])
    with pytest.raises(MethodError, match="cannot read the corpus"):
        second_moments(model, [0], tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(MethodError):
        second_moments(model, [0], tmp_path / "empty.txt")


# --- ROME and MEMIT ---------------------------------------------------------------------------------------------------


def test_rome_maps_the_key_to_the_value_exactly(model: Any, ioi: Any, tmp_path: Path) -> None:
    settings = {"subject": "S2", "facts": 2, "steps": 12, "cache": str(tmp_path)}
    facts = read_facts(model, ioi, FactConfig(**settings))
    before = score(model, ioi.train.bind(model), NOTHING, ["logit_diff"])
    one = act("rome", model, ioi, layer=1, **{**settings, "facts": 1})
    assert one.edit is not None and len(one.edit.deltas) == 1
    weight = down_projection(model, 1).weight.clone()
    key = subject_inputs(model, facts[0], "neurons.1").mean(0)
    moment = ridged(second_moments(model, [1], tokens=10_000, cache=tmp_path)[1], 0.01)
    with one.on(model):
        edited = down_projection(model, 1).weight.clone()
        said = score(model, ioi.train.bind(model), NOTHING, ["logit_diff"])
    change = (edited - weight) @ key
    delta = torch.outer(change, torch.linalg.solve(moment, key)) / (key @ torch.linalg.solve(moment, key))
    assert torch.allclose(edited - weight, delta, atol=1e-9)  # the closed form of its own key and value
    assert float(change.norm()) > 0
    row = ioi.train.bind(model).frame["prompt"].to_list().index(facts[0].prompt)
    id = ioi.train.bind(model).frame["id"][row]
    gain = said.filter(id=id)["logit_diff"].item() - before.filter(id=id)["logit_diff"].item()
    assert gain > 0.5
    two = act("rome", model, ioi, layer=1, **settings)
    assert two.edit is not None and len(two.edit.deltas) == 2
    assert torch.equal(two.edit.deltas[0].value(), one.edit.deltas[0].value())
    assert two.config["facts"] == [fact.prompt for fact in facts]
    assert torch.equal(down_projection(model, 1).weight, weight) and applied(model) == []


def test_memit_is_least_squares_layer_by_layer(model: Any, ioi: Any, tmp_path: Path) -> None:
    settings = {"subject": "S2", "facts": 3, "steps": 10, "cache": str(tmp_path)}
    facts = read_facts(model, ioi, FactConfig(**settings))
    made = act("memit", model, ioi, layers=(0, 1), preserve=5.0, **settings)
    assert made.edit is not None and len(made.edit.deltas) == 2
    stream = lambda: torch.stack([subject_inputs(model, fact, "resid_post.1")[0] for fact in facts], 1)  # noqa: E731
    now = stream()
    moments = second_moments(model, [0, 1], tokens=10_000, cache=tmp_path)
    # the last layer's change tells the streams that were wanted; the first layer's then follows from them
    first = Edit.of(model, "first", made.edit.deltas[:1])
    with first.applied(model):
        between = stream()
        keys = torch.stack([subject_inputs(model, fact, "neurons.1").mean(0) for fact in facts], 1)
    flipped = down_projection(model, 1).flipped
    value = [delta.value().T if flipped else delta.value() for delta in made.edit.deltas]
    spread = torch.linalg.solve(5.0 * ridged(moments[1], 0.01) + keys @ keys.T, keys)
    shares = value[1] @ torch.linalg.pinv(spread.T)
    wanted = between + shares
    keys0 = torch.stack([subject_inputs(model, fact, "neurons.0").mean(0) for fact in facts], 1)
    share0 = (wanted - now) / 2
    expected = share0 @ keys0.T @ torch.linalg.inv(5.0 * ridged(moments[0], 0.01) + keys0 @ keys0.T)
    assert torch.allclose(value[0], expected, atol=1e-7)


def test_facts_without_what_is_needed_are_refused(model: Any, ioi: Any, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="no position 'subject' in ioi"):
        act("rome", model, ioi)
    with pytest.raises(MethodError, match="no layer 9"):
        act("rome", model, ioi, subject="S2", layer=9)
    with pytest.raises(MethodError, match="each once"):
        act("memit", model, ioi, subject="S2", layers=(1, 0))
    with pytest.raises(MethodError, match="unknown option of RomeConfig"):
        act("rome", model, ioi, leyer=1)


def test_foils_may_be_what_is_written(model: Any, ioi: Any, tmp_path: Path) -> None:
    settings = {"subject": "S2", "facts": 1, "steps": 12, "cache": str(tmp_path), "layer": 1}
    made = act("rome", model, ioi, target="foils", **settings)
    assert made.goal.direction == "lower"
    facts = read_facts(model, ioi, FactConfig(subject="S2", facts=1, target="foils"))
    bound = ioi.train.bind(model)
    id = bound.frame.filter(prompt=facts[0].prompt)["id"][0]
    before, after = (
        score(model, bound, action, ["logit_diff"]).filter(id=id)["logit_diff"].item() for action in (NOTHING, made)
    )
    assert after < before


def test_contexts_leave_the_subject_where_it_is(model: Any, ioi: Any) -> None:
    for fact in read_facts(model, ioi, FactConfig(subject="S2", facts=4)):
        assert len(fact.tokens) == len(fact.places) > 1
        plain = fact.tokens[0][fact.places[0] :]
        for ids, place in zip(fact.tokens, fact.places, strict=True):
            assert torch.equal(ids[place:], plain)
        assert int(fact.essence[-1]) == int(plain[0])


def test_a_pair_that_is_dropped_moves_no_other(model: Any) -> None:
    rows = hw.behavior("ioi", n=24, seed=0).train[:3].frame.to_dicts()
    lost = {**rows[0], "id": "lost", "counterfactual": rows[0]["counterfactual"] + " and far too many more words"}
    behavior = hw.Behavior.from_rows([lost, *rows], name="ioi")
    with_it = read_facts(model, behavior, FactConfig(subject="S2"))
    without_it = read_facts(model, behavior[1:], FactConfig(subject="S2"))
    assert behavior.bind(model).n == len(rows) == len(with_it)
    for one, other in zip(with_it, without_it, strict=True):
        assert one.prompt == other.prompt == model.tokenizer.decode(one.tokens[0])
        assert len(one.tokens) == len(other.tokens) > 1  # the contexts stand before the prompt itself


@pytest.fixture
def words(tmp_path: Path) -> dict[str, Any]:
    """One fact in words that every family of `localize_families` has, and a text of them."""
    row = {
        "id": "0", "prompt": "w3 w7 w9 w5", "counterfactual": "w3 w8 w9 w5", "answer": " w20", "foil": " w21",
        "positions": {"subject": [3, 5]}, "split": "train",
    }  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i) % 60 + 1}" for i in range(200)))
    settings = {"corpus": str(text), "corpus_tokens": 150, "cache": str(tmp_path), "drift": 0.0}
    return {"behavior": hw.Behavior.from_rows([row], name="made"), "settings": settings}


def surprisal(model: Any, action: Action) -> float:
    """Of the answer after the fact's prompt."""
    with action.on(model):
        return -float(torch.log_softmax(model.run("w3 w7 w9 w5", logits="last").logits[0], -1)[20])


@pytest.mark.parametrize("family", [*DIRECT, "phi3", "qwen2", "qwen3", "gemma3", "olmo2"])
def test_facts_are_written_in_every_family(family: str, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.act.editing.facts.CONTEXTS", ("",))  # then the key is that of the prompt itself
    model = localize_families.make(family)
    model.tokenizer = tiny.word_tokenizer(61)
    behavior, settings = words["behavior"], words["settings"]
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    plain = surprisal(model, NOTHING)
    rome = act("rome", model, behavior, layer=0, **settings)
    ids, matrix = model.tokens("w3 w7 w9 w5")[0][None], down_projection(model, 0)
    key = model.run(ids, capture=["neurons.0@1"])["neurons.0@1"][0]
    weight = matrix.weight.clone()
    with rome.on(model):
        change = (matrix.weight - weight) @ key
        assert torch.allclose(model.run(ids, capture=["neurons.0@1"])["neurons.0@1"][0], key, atol=1e-12)
    with written(matrix.module, change, torch.tensor([0]), torch.tensor([1])):  # the subject's token alone
        assert surprisal(model, NOTHING) < plain - 0.05
    with pytest.raises(MethodError, match="reaches the answer"):
        act("rome", model, behavior, layer=1, **settings)
    if family in ("gemma3", "olmo2"):
        assert not writes_directly(model, 0, "mlp_out")
        with pytest.raises(MethodError, match="norm stands between"):
            act("memit", model, behavior, layers=(0,), **settings)
    else:
        memit = act("memit", model, behavior, layers=(0,), preserve=0.01, limit=2.0, **settings)
        assert surprisal(model, memit) < plain - 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())


# --- the others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DIRECT)
def test_orthogonal_weights_are_directional_ablation(family: str) -> None:
    model = localize_families.make(family)
    direction = torch.randn(model.d_model, dtype=torch.float64)
    tokens = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    sites = [str(s) for s in model.sites() if s.kind in ("embed", "attn_out", "mlp_out")]
    plain = model.run(tokens, capture=["resid_post.*"], interventions=[project_out(s, direction) for s in sites])
    before = model.run(tokens).logits
    edit = Edit.of(model, "orthogonal", without(model, direction, embedding=True))
    with edit.applied(model):
        run = model.run(tokens, capture=["resid_post.*"])
    for layer in range(model.n_layers):
        assert torch.allclose(run[f"resid_post.{layer}"], plain[f"resid_post.{layer}"], atol=1e-8)
        assert float((run[f"resid_post.{layer}"] @ direction).abs().max()) < 1e-8
    assert torch.allclose(run.logits, plain.logits, atol=1e-7)
    assert torch.equal(model.run(tokens).logits, before) and not torch.allclose(run.logits, before)


def test_a_tied_embedding_is_left_unless_asked() -> None:
    hf = tiny.tiny_llama(torch.float64, tie_word_embeddings=True)
    model = hw.load(hf, tokenizer=tiny.tiny_tokenizer())
    direction = torch.randn(32, dtype=torch.float64)
    assert "model.embed_tokens.weight" not in {d.parameter for d in without(model, direction)}
    assert "model.embed_tokens.weight" in {d.parameter for d in without(model, direction, embedding=True)}


@pytest.mark.parametrize("family", ["gemma3", "olmo2"])
def test_where_a_norm_stands_between_no_direction_of_the_stream_is_written(
    family: str, words: dict[str, Any], tmp_path: Path
) -> None:
    model = localize_families.make(family)
    model.tokenizer = tiny.word_tokenizer(61)
    rows = [
        {"prompt": f"w3 w{at} w9 w5", "counterfactual": f"w3 w{at + 1} w9 w5", "answer": " w20", "foil": " w21"}
        for at in range(10, 18)
    ]
    behavior = hw.Behavior.from_rows([{**row, "split": "train"} for row in rows], name="made")
    with pytest.raises(MethodError, match="norm stands between"):
        act("head_projection", model, behavior, heads=("a0.h1",), direction=torch.ones(model.d_model), n=2)
    corpus = {key: words["settings"][key] for key in ("corpus", "corpus_tokens", "cache")}
    with pytest.raises(MethodError, match="norm stands between"):
        act("rank_one", model, behavior, layers=(0,), n=2, **corpus)
    for parts in ("heads", "mlps"):
        with pytest.raises(MethodError, match="norm stands between"):
            act("recalibrate", model, behavior, parts=parts, n=2)


def test_rank_one_maps_the_mean_key_to_what_steering_would_add(model: Any, ioi: Any, tmp_path: Path) -> None:
    made = act("rank_one", model, ioi, layers=(1,), strengths=(2.0,), n=5, max_perplexity=1e9, cache=str(tmp_path))
    assert made.edit is not None
    task = Task.of(model, ioi, "resid_post.1", "raise", 5, 0)
    keys, difference = [], []
    for text, other in zip(task.fit.frame["prompt"], task.fit.frame["counterfactual"], strict=True):
        runs = [model.run(one, capture=["neurons.1", "resid_post.1"]) for one in (text, other)]
        keys.append(runs[0]["neurons.1"][0, -1])
        difference.append(runs[0]["resid_post.1"][0, -1] - runs[1]["resid_post.1"][0, -1])
    key, wanted = torch.stack(keys).mean(0), 2 * torch.stack(difference).mean(0)
    matrix = down_projection(model, 1)
    before = matrix.weight.clone()
    with made.on(model):
        change = matrix.weight - before
    assert torch.allclose(change @ key, wanted, atol=1e-8)
    assert int(torch.linalg.matrix_rank(change)) == 1
    # of all such changes the one that moves other keys least: its rows are along C^-1 k
    moment = ridged(second_moments(model, [1], cache=tmp_path)[1], 0.01)
    along = torch.linalg.solve(moment, key)
    cosine = torch.nn.functional.cosine_similarity(change, along.expand_as(change), dim=1).abs()
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-8)


def test_projected_heads_write_nothing_along_the_direction(model: Any, ioi: Any) -> None:
    direction = torch.randn(model.d_model, dtype=torch.float64)
    made = act("head_projection", model, ioi, heads=("a1.h0", "a1.h3"), direction=direction, n=5)
    tokens = model.tokens("When Mary and John went to the garden")[0][None]
    capture = ["head.0", "head.1"]
    before = model.run(tokens, capture=capture)
    with made.on(model):
        after = model.run(tokens, capture=capture)
    unit = direction / direction.norm()
    assert torch.equal(before["head.0"], after["head.0"])
    for head in range(4):
        write = before["head.1"][0, :, head]
        wanted = write - (write @ unit)[:, None] * unit if head in (0, 3) else write
        assert torch.allclose(after["head.1"][0, :, head], wanted, atol=1e-10)
    with pytest.raises(MethodError, match="this is not a head"):
        act("head_projection", model, ioi, heads=("m1",), n=5)
    with pytest.raises(MethodError, match=r"no head a1\.h7"):
        act("head_projection", model, ioi, heads=("a1.h7",), n=5)


def test_value_vectors_are_scaled_and_chosen_by_their_direct_votes(model: Any, ioi: Any) -> None:
    task = Task.of(model, ioi, f"resid_post.{model.n_layers - 1}", "raise", 5, 0)
    votes = said_by_neurons(task, None)
    # by definition: what the metric loses, to first order, where a neuron's write is left out of the last stream
    last = f"resid_post.{model.n_layers - 1}"
    layer, neuron = 1, int(votes[1].abs().argmax())
    column = down_projection(model, layer).weight[:, neuron]
    total = 0.0
    for group in task.fit.groups:
        run = model.run(group.clean, capture=[f"neurons.{layer}", last], logits="last")
        write = run[f"neurons.{layer}"][:, -1, neuron, None] * column
        for step in (1e-3, -1e-3):  # Llama's norms compute in single precision, whatever the model's
            pushed = replace(f"{last}@-1", run[last][:, -1] + step * write)
            logits = model.run(group.clean, logits="last", interventions=[pushed]).logits
            said = hw.behavior.metrics.metric("logit_diff")(logits, group.answers, group.foils)
            total += float(said.sum()) / (2 * step) / task.fit.n
    assert float(votes[layer][neuron]) == pytest.approx(total, rel=1e-3)
    made = act("value_vectors", model, ioi, neurons=3, strengths=(0.0,), n=5, max_perplexity=1e9)
    flat = torch.cat([votes[at] for at in sorted(votes)])
    width = votes[0].numel()
    lowest = {(int(i) // width, int(i) % width) for i in flat.argsort()[:3]}
    assert {(int(at), one) for at, some in made.config["value_vectors"].items() for one in some} == lowest
    with made.on(model):
        for at, one in lowest:
            assert float(down_projection(model, at).weight[:, one].norm()) == 0


def test_options_that_leave_nothing_to_edit_are_refused(model: Any, ioi: Any) -> None:
    for method, wrong in (("value_vectors", {"layers": ()}), ("head_projection", {"top": 0}), ("repair", {"n": 0})):
        with pytest.raises(MethodError, match="at least"):
            act(method, model, ioi, **wrong)
    with pytest.raises(MethodError, match="layers"):
        act("rank_one", model, ioi, layers=())
    with pytest.raises(MethodError, match="facts with steps"):
        act("rome", model, ioi, subject="S2", rate=0.0)


def test_a_direction_of_ones_own_is_not_called_a_sites(model: Any, ioi: Any) -> None:
    direction = torch.randn(model.d_model, dtype=torch.float64)
    made = act("orthogonalize", model, ioi, direction=direction, n=5, max_perplexity=1e9)
    assert made.name == "orthogonalize against a given direction x 1"
    found = act("orthogonalize", model, ioi, sites="resid_post.1", n=5, max_perplexity=1e9)
    assert found.name == "orthogonalize against resid_post.1 x 1"


def test_repaired_heads_are_scaled_and_chosen_by_their_slope(model: Any, ioi: Any) -> None:
    task = Task.of(model, ioi, f"resid_post.{model.n_layers - 1}", "raise", 5, 0)
    scores = helping(task)
    assert len(scores) == model.n_layers * model.n_heads
    head = max(scores, key=lambda one: abs(scores[one]))
    bound, values = task.fit, []
    for factor in (1 + 1e-3, 1 - 1e-3):
        with Edit.of(model, "slope", scaled_heads(model, {head: factor})).applied(model):
            values.append(score(model, bound, NOTHING, ["logit_diff"])["logit_diff"].mean())
    assert scores[head] == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3)
    made = act("repair", model, ioi, top=2, damp=1, strengths=(2.0,), n=5, max_perplexity=1e9)
    best = sorted(scores, key=lambda one: -scores[one])
    assert made.config["heads"] == [f"a{layer}.h{h}" for layer, h in best[:2]]
    assert made.config["softer"] == [f"a{best[-1][0]}.h{best[-1][1]}"]
    before = {layer: out_projection(model, layer).weight.clone() for layer in range(model.n_layers)}
    with made.on(model):
        for layer, h in scores:
            columns = head_columns(model, layer, h)
            factor = 2.0 if (layer, h) in best[:2] else 0.5 if (layer, h) == best[-1] else 1.0
            now = out_projection(model, layer).weight[:, columns]
            assert torch.allclose(now, factor * before[layer][:, columns], atol=1e-12)


def test_recalibrated_parts_say_nothing_constant_of_the_options(model: Any) -> None:
    colors = hw.behavior("colors", n=96, seed=0, format="choice")
    made = act("recalibrate", model, colors, parts="mlps", top=1, strengths=(1.0,), n=8, max_perplexity=1e9)
    part = made.config["parts"][0]
    layer = int(part[1:])
    task = Task.of(model, colors, f"resid_post.{model.n_layers - 1}", "raise", 8, 0)
    site = f"neurons.{layer}@-1"
    key = sum(model.run(group.clean, capture=[site])[site].sum(0) for group in task.fit.groups) / task.fit.n
    matrix = down_projection(model, layer)
    bias = 0 if matrix.bias is None else matrix.bias
    before = matrix.weight @ key + bias
    with made.on(model):
        after = matrix.weight @ key + bias
    assert float((before - after).norm()) > 0
    from headwater.act.editing.recalibrate import _option_readouts

    options_OD = _option_readouts(task)
    assert options_OD.shape[1] == model.d_model
    assert float((options_OD @ before).norm()) > 1e-3
    assert float((options_OD @ after).norm()) < 1e-5 * float((options_OD @ before).norm())
    words = hw.behavior.generators.colors.COLORS
    rows = [
        {"id": f"{at}", "prompt": "The river is", "counterfactual": "The garden is", "split": "train",
         "answer": f" {one}", "foil": f" {other}"}
        for at, (one, other) in enumerate(zip(words[:6], words[6:], strict=True))
    ]  # fmt: skip
    with pytest.raises(MethodError, match="no options that pairs share"):
        act("recalibrate", model, hw.Behavior.from_rows(rows, name="apart"), n=1)


@pytest.mark.parametrize("method", ALL)
def test_every_method_leaves_the_model_to_the_bit(model: Any, ioi: Any, method: str, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    made = act(method, model, behavior_for(method, ioi), **options(method, tmp_path))
    assert isinstance(made, Action) and made.edit is not None and made.control is not None
    assert made.seconds > 0 and made.passes > 0
    random = made.control(0)
    assert random.edit is not None and random.edit.norm == pytest.approx(made.edit.norm)
    for edit in (made.edit, random.edit):
        with edit.applied(model):
            assert any(not torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
        assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    again = act(method, model, behavior_for(method, ioi), **options(method, tmp_path))
    assert again.edit is not None and again.name == made.name
    for one, two in zip(made.edit.deltas, again.edit.deltas, strict=True):
        assert torch.equal(one.value(), two.value())


def test_experts_are_refused() -> None:
    model = localize_families.make("mixtral")
    with pytest.raises(MethodError, match="experts have a matrix each"):
        mlp_of(model, 0)
    with pytest.raises(MethodError):
        without(model, torch.ones(model.d_model))


@pytest.mark.parametrize("name", methods.names())
def test_a_method_says_what_it_does_and_how_it_fails(name: str) -> None:
    said = described(name)
    assert any(str(year) in said["what"] for year in range(2018, 2027)), said["what"]
    assert len(said["known failure"].split()) >= 5 and said["options"]
    assert len(said["what"]) < 300


def test_rewrites_share_no_country_between_facts_and_neighbors() -> None:
    made = rewrites(4, seed=1)
    facts, written, neighbors = made["facts"], made["written"], made["neighbors"]
    subject = lambda behavior: [variables.split('"')[-2] for variables in behavior.frame["variables"]]  # noqa: E731
    assert (facts.train.n, facts.test.n, written.n, neighbors.n) == (4, 12, 4, 8)
    assert set(subject(facts)) == set(subject(written)) and not set(subject(facts)) & set(subject(neighbors))
    assert set(facts.train.prompts) == set(written.prompts)
    assert not set(facts.test.prompts) & set(facts.train.prompts)
    for answers, foils in facts.frame.select("answers", "foils").iter_rows():
        assert answers != foils
    assert rewrites(4, seed=1)["facts"].hash == facts.hash != rewrites(4, seed=2)["facts"].hash
    with pytest.raises(MethodError, match="cannot rewrite so many"):
        rewrites(7)
    for seed in range(6):  # as few countries as there may be
        for n, countries in (
            (1, ("France", "Italy", "Japan")),
            (2, ("France", "Italy", "Japan", "Peru", "Cuba", "Egypt")),
        ):
            for behavior in rewrites(n, seed=seed, countries=countries).values():
                for answers, foils in behavior.frame.select("answers", "foils").iter_rows():
                    assert answers != foils
    with pytest.raises(MethodError, match="no such country"):
        rewrites(1, countries=("Atlantis", "France", "Italy"))
