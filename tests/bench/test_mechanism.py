"""The circuit that comes out with the weights is the one the model has: by force, by interventions, and by localize."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

import headwater as hw
from headwater.bench import truth
from headwater.bench.interchange import PlainRun, interchange
from headwater.bench.mechanism import TrueMechanism
from headwater.bench.rasp import Aggregate, Map, RaspError, Select, SelectorWidth, SOp, indices, tokens
from headwater.bench.rasp.interpreter import Interpreter
from headwater.core.errors import BehaviorError, ModelError
from headwater.localize import graph_of
from headwater.localize.engine.wiring import measure

SMALL = [
    "histogram", "reverse", "induction", "causal_induction", "fraction_of_x", "more_x_than_y", "sort_unique",
    "distinct", "is_palindrome", "detect_abc",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_interchange_matters_in_the_circuit_and_nowhere_else(name: str) -> None:
    compiled = truth.compile(name)
    found = interchange(compiled.model, compiled.mechanism, truth.behavior(compiled, 24, seed=1))
    edges = found.tables["edges"]
    assert found.facts["outside"] == 0.0
    assert edges.filter(~pl.col("live"))["changed"].max() == 0.0
    assert edges.filter(pl.col("live")).height == int(compiled.mechanism.tensors["mask"].sum())
    assert found.facts["needed"] == 1.0, edges.filter(pl.col("live") & (pl.col("changed") == 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*truth.names()} - {*SMALL, "length"}))
def test_interchange_of_every_program(name: str) -> None:
    compiled = truth.compile(name)
    found = interchange(compiled.model, compiled.mechanism, truth.behavior(compiled, 48))
    assert found.facts["outside"] == 0.0 and found.facts["needed"] == 1.0


@pytest.mark.parametrize("name", ["induction", "causal_induction", "fraction_of_x"])
def test_nodes_outside_the_circuit_change_nothing_by_headwaters_own_interventions(name: str) -> None:
    """The same as `interchange`, through hooks on the unmodified model: logits equal to the last bit."""
    compiled = truth.compile(name)
    model, graph = compiled.model, compiled.mechanism.graph
    group = truth.behavior(compiled, 16).bind(model).groups[0]
    sites = [f"head.{layer}" for layer in range(graph.n_layers)] + [
        f"mlp_out.{layer}" for layer in range(graph.n_layers)
    ]
    other = model.run(group.corrupt, capture=sites)
    plain = model.run(group.clean).logits
    alive = set(compiled.mechanism.live_nodes)
    changes = {}
    for layer in range(graph.n_layers):
        for node, site, value in [
            *((f"a{layer}.h{h}", f"head.{layer}.h{h}", other[f"head.{layer}"][:, :, h]) for h in range(graph.n_heads)),
            (f"m{layer}", f"mlp_out.{layer}", other[f"mlp_out.{layer}"]),
        ]:
            patched = model.run(group.clean, interventions=[hw.replace(site, value)]).logits
            changes[node] = float((patched - plain)[:, -1].abs().max())
    assert {node for node, change in changes.items() if change > 1e-3} == alive - {"input"}


@pytest.mark.parametrize("name", SMALL)
def test_headwater_takes_the_model_like_any_other(name: str) -> None:
    compiled = truth.compile(name)
    model, mechanism = compiled.model, compiled.mechanism
    assert model.anatomy.refused == {}
    assert measure(compiled.hf, model.anatomy).graph == graph_of(model) == mechanism.graph
    circuit = mechanism.circuit(model)
    pairs = truth.behavior(compiled, 16)
    assert circuit.faithfulness(pairs).value == pytest.approx(1.0, abs=1e-4)
    assert circuit.completeness(pairs).value == pytest.approx(0.0, abs=1e-4)
    assert circuit.n_edges <= mechanism.circuit(model, live=False).n_edges <= graph_of(model).n_edges
    report = hw.behavior.evaluate(model, pairs, canary=False)
    assert report.value("accuracy") == 1.0


@pytest.mark.parametrize("name", ["induction", "sort_unique", "causal_parity"])
def test_the_forced_run_is_the_models_own(name: str) -> None:
    """PlainRun, written from the definition, and headwater's circuit evaluation agree on random circuits."""
    compiled = truth.compile(name)
    graph, model = compiled.mechanism.graph, compiled.model
    group = truth.behavior(compiled, 8).bind(model).groups[0]
    run = PlainRun(compiled.hf, graph, group.clean, group.corrupt)
    torch.testing.assert_close(run.clean, model.run(group.clean, logits="last").logits)
    none = run.logits(torch.zeros_like(graph.allowed)[None])[0]
    torch.testing.assert_close(none, model.run(group.corrupt, logits="last").logits)
    generator = torch.Generator().manual_seed(0)
    from headwater.localize.circuit import Circuit

    pairs = truth.behavior(compiled, 8)
    for _ in range(4):
        mask = graph.allowed & (torch.rand(graph.allowed.shape, generator=generator) < 0.8)
        logits = run.logits(mask[None])[0]
        rows = torch.arange(len(logits))
        mine = (logits[rows, group.answers[:, 0]] - logits[rows, group.foils[:, 0]]).double()
        found = Circuit.build(graph, mask, model=model).faithfulness(pairs)
        torch.testing.assert_close(found.tensors["values"].flatten().double(), mine, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["induction", "sort", "pair_balance", "shuffle_dyck_1"])
def test_variables_lie_where_the_mechanism_says(name: str) -> None:
    """The final stream holds every variable's value, as the interpreter gives it, along its directions."""
    compiled = truth.compile(name)
    mechanism, model = compiled.mechanism, compiled.model
    pairs = truth.behavior(compiled, 6)
    stream = model.run(pairs.prompts, capture=[f"resid_post.{model.n_layers - 1}"])
    final = stream[f"resid_post.{model.n_layers - 1}"][:, 1:]
    from headwater.bench.rasp.bases import infer_bases

    words = {str(value): value for value in compiled.vocabulary}
    bases = infer_bases(compiled.program, compiled.vocabulary, compiled.config.max_length)
    known = set(mechanism.tables["variables"]["variable"])
    seen = 0
    for expression, variable in bases.items():
        if variable.name not in known:
            continue
        read = final @ mechanism.directions(variable.name).T
        for row, prompt in enumerate(pairs.prompts):
            values = Interpreter([words[w] for w in prompt.split()], causal=compiled.config.causal).values(expression)  # type: ignore[arg-type]
            wanted = torch.tensor([variable.column(value) for value in values])
            torch.testing.assert_close(read[row], wanted, atol=1e-4, rtol=0)
        seen += 1
    assert seen >= 4
    with pytest.raises(RaspError, match="tokens"):
        mechanism.directions("nothing")


def test_a_saved_folder_loads_like_any_other(tmp_path: Path, python: Any) -> None:
    """By headwater in a process that knows nothing of this room, and by transformers once the room is imported."""
    compiled = truth.compile("histogram")
    compiled.save(tmp_path / "made")
    model, mechanism = truth.load(tmp_path / "made")
    assert mechanism.content_hash == compiled.mechanism.content_hash
    assert model.fingerprint == compiled.model.fingerprint
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    ids = torch.tensor([compiled.ids("abca")])
    assert torch.equal(plain(ids).logits, compiled.hf(ids).logits)
    code = (
        "import sys, headwater as hw\n"
        f"model = hw.load({str(tmp_path / 'made')!r})\n"
        "says = model.tokenizer.decode(model.run('a b c a', logits='last').logits.argmax())\n"
        f"kind = hw.load_result({str(tmp_path / 'made' / 'mechanism')!r}).kind\n"
        "sys.stdout.write(f'{says} {kind}')"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 mechanism"


def test_pairs() -> None:
    compiled = truth.compile("histogram")
    pairs = truth.behavior(compiled, 40, length=4, minimal=1.0)
    bound = pairs.bind(compiled.model)
    assert bound.n == 40 and bound.reasons == {}
    assert all(
        sum(x != y for x, y in zip(a.split(), b.split(), strict=True)) == 1
        for a, b in zip(pairs.prompts, pairs.counterfactuals, strict=True)
    )
    assert truth.behavior(compiled, 40, length=4, minimal=1.0).hash == pairs.hash
    assert truth.behavior(compiled, 40, length=4, minimal=1.0, seed=1).hash != pairs.hash
    with pytest.raises(BehaviorError, match="depends on the length only"):
        truth.behavior("length", 4)
    with pytest.raises(BehaviorError, match="length of 1 to 7"):
        truth.behavior(compiled, 4, length=9)


def test_what_never_differs_is_in_the_program_but_not_live() -> None:
    """Reverse: positions and length say where to look; only the tokens move."""
    mechanism = truth.compile("reverse").mechanism
    edges = mechanism.tables["edges"]
    live = edges.filter(pl.col("live")).select("source", "target", "variable").rows()
    assert live == [("input", "a2.h0<v>", "tokens"), ("a2.h0", "logits", "reversed")]
    assert ("m1", "a2.h0<q>", "opposite", False) in edges.rows()
    assert mechanism.tables["nodes"].filter(pl.col("role") == "spare").height > 0


def test_what_is_not_read_is_not_compiled() -> None:
    """A predicate that ignores one side reads nothing from there, and dead code leaves no trace."""
    back = Aggregate(Select(indices, indices, lambda k, q: k == q - 1), tokens, label="back")
    program: SOp = SelectorWidth(Select(tokens, back, lambda k, q: k == "a", label="as"), label="n")
    made = truth.compile(program, "abc")
    assert made.mechanism.graph.n_layers == 2  # `back` may be undefined, so it is read
    always: SOp = SelectorWidth(
        Select(tokens, Map(lambda t: t, tokens, label="copy"), lambda k, q: k == "a"), label="n"
    )
    made = truth.compile(always, "abc")
    assert made.mechanism.graph.n_layers == 1
    assert "copy" not in made.mechanism.tables["variables"]["variable"].to_list()


def test_inputs_and_models_that_do_not_fit_are_refused() -> None:
    import tiny

    compiled = truth.compile("histogram")
    for inputs in ("", "abcdabcd", "xyz"):
        with pytest.raises(RaspError, match="not compiled for this input"):
            compiled.outputs([inputs])
    other = hw.load(tiny.tiny_gpt2())
    with pytest.raises(ModelError, match="knows one architecture"):
        PlainRun(other.hf, compiled.mechanism.graph, torch.zeros(1, 3).long(), torch.zeros(1, 3).long())
    with pytest.raises(RaspError, match="vocabulary"):
        truth.compile(tokens)
    assert isinstance(compiled.mechanism, TrueMechanism)
    with pytest.raises(ValueError, match="no key/value cache"):
        compiled.hf(torch.tensor([[1, 3]]), past_key_values=object())
