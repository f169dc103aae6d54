"""Training to a known mechanism: causal graphs, interchange, the losses, the checks, and what is stored."""

import dataclasses
import json
import pickle
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import headwater as hw
from headwater.bench import siit
from headwater.bench.rasp.interpreter import evaluate
from headwater.bench.rasp.language import RaspError
from headwater.bench.rasp.library import programs
from headwater.bench.rasp.words import word
from headwater.bench.siit.alignment import Alignment, Place, align, before
from headwater.bench.siit.causal import NO_VALUE, Swap, Variable, Written
from headwater.bench.siit.checks import quick_check
from headwater.bench.siit.ioi import IOI, NAMES
from headwater.bench.siit.programs import RaspGraph
from headwater.bench.siit.recovering import auroc
from headwater.bench.siit.training import Task, Training, causal_graph, draw_outside, losses, make_model
from headwater.core.errors import MethodError, ModelError, StoreError
from headwater.core.interventions import replace
from headwater.core.results import load_result

SMALL = siit.SiitConfig(
    graph="repeats", length=5, n_layers=1, n_heads=2, d_model=32, d_mlp=48, batch=96, steps=400, lr=4e-3,
    check_every=50, check_rows=256,
)  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[siit.Siit, Path]:
    folder = tmp_path_factory.mktemp("siit") / "repeats"
    return siit.train(SMALL, out=folder, checks=400), folder


@pytest.fixture(scope="module")
def ioi_task() -> Task:
    config = siit.SiitConfig(graph="ioi", length=14, n_layers=3, n_heads=4, d_model=16, d_mlp=16)
    causal = causal_graph(config)
    return Task(causal, make_model(config, causal), align(causal, n_heads=4))


# --- causal graphs


@pytest.mark.parametrize("name", programs.names())
@pytest.mark.parametrize("causal", [True, False])
def test_a_program_as_a_graph_means_what_the_interpreter_says(name: str, causal: bool) -> None:
    program = programs.get(name)
    graph = RaspGraph(name, program.make(), program.vocabulary, length=5, causal=causal)
    inputs = graph.sample(40, seeded())
    outputs = graph.run(inputs)[graph.output]
    for row, found in zip(inputs.tolist(), outputs.tolist(), strict=True):
        try:
            values = evaluate(graph.program, [graph.tokens[code] for code in row], causal=causal)
        except RaspError:
            assert found == [NO_VALUE] * 5
            continue
        assert [graph.answers[code] for code in found] == [word(value) for value in values]


def test_a_swap_gives_what_the_program_makes_of_the_other_runs_value() -> None:
    program = programs.get("repeats")  # is this token the one before it?
    graph = RaspGraph("repeats", program.make(), program.vocabulary, length=6)
    assert graph.variables == ("before", "repeats")
    one, other = graph.sample(64, seeded(1)), graph.sample(64, seeded(2))
    rows = torch.arange(64) % 2 == 0
    found = graph.run(one, Swap(values=graph.run(other), rows={"before": rows}))["repeats"]
    theirs = torch.cat([torch.full((64, 1), -5), other[:, :-1]], dim=1)
    mine = torch.cat([torch.full((64, 1), -5), one[:, :-1]], dim=1)
    expected = one == torch.where(rows[:, None], theirs, mine)
    words = [[graph.answers[code] == "True" for code in row] for row in found.tolist()]
    assert words == expected.tolist()


def test_swaps_of_the_output_itself_win_over_those_before_it() -> None:
    program = programs.get("repeats")
    graph = RaspGraph("repeats", program.make(), program.vocabulary, length=6)
    one, other = graph.sample(16, seeded(1)), graph.sample(16, seeded(2))
    theirs, every = graph.run(other), torch.ones(16, dtype=torch.bool)
    found = graph.run(one, Swap(values=theirs, rows={"before": every, "repeats": every}))
    assert torch.equal(found["repeats"], theirs["repeats"]) and torch.equal(found["before"], theirs["before"])


def test_a_graph_by_hand_refuses_what_does_not_hold_together() -> None:
    same = Variable(name="same", parents=("nothing",), compute=lambda x: x)
    with pytest.raises(MethodError, match="does not hold together at 'same'"):
        Written("g", [same], vocabulary="ab", answers="ab", length=3)
    with pytest.raises(MethodError, match="no variables"):
        Written("g", [], vocabulary="ab", answers="ab", length=3)


def test_ioi_says_the_name_said_once() -> None:
    graph = IOI()
    inputs = graph.sample(300, seeded())
    values = graph.run(inputs)
    for row, said in zip(inputs.tolist(), values["name_mover"].tolist(), strict=True):
        names = [graph.vocabulary[code] for code in row if graph.vocabulary[code] in NAMES]
        assert len(names) == 3 and len(set(names)) == 2
        once = next(name for name in names if names.count(name) == 1)
        assert graph.answers[said[-1]] == once and set(said[:-1]) == {NO_VALUE}


def test_ioi_variables_swap_as_the_circuit_would() -> None:
    graph = IOI()
    inputs = graph.sample(200, seeded(3))
    partners = graph.partners(inputs, seeded(4))
    assert torch.equal(graph.templates(inputs), graph.templates(partners))
    mine, theirs = graph.run(inputs), graph.run(partners)
    every = torch.ones(200, dtype=torch.bool)

    def after(*names: str) -> torch.Tensor:
        return graph.run(inputs, Swap(values=theirs, rows=dict.fromkeys(names, every)))["name_mover"][:, -1]

    assert torch.equal(after("name_mover"), theirs["name_mover"][:, -1])
    # whose slot is inhibited: where it differs, the other of one's own two names is said
    differs = mine["s_inhibition"][:, -1] != theirs["s_inhibition"][:, -1]
    assert 0.3 < differs.float().mean() < 0.7
    assert torch.equal(after("s_inhibition"), after("duplicate_token"))
    assert torch.equal(after("s_inhibition") != mine["name_mover"][:, -1], differs)
    flipped = graph.run(graph.nudged(inputs, seeded()))["name_mover"][:, -1]
    assert torch.equal(after("s_inhibition")[differs], flipped[differs])


# --- alignment


@pytest.mark.parametrize("name", siit.configs.names())
def test_every_config_has_room_for_its_variables(name: str) -> None:
    config = siit.configs.get(name)
    causal = causal_graph(config)
    alignment = align(causal, n_heads=config.n_heads, seed=config.align_seed, n_layers=config.n_layers)
    from headwater.localize.graph import Graph

    graph = Graph(n_layers=config.n_layers, n_heads=config.n_heads, n_kv_heads=config.n_heads)
    alignment.check(causal, graph)
    assert alignment.outside(graph), "a model that is all circuit tests nothing"
    assert Alignment.from_list(alignment.to_list()) == alignment
    for edge in siit.alignment.true_edges(causal, alignment):
        if edge["source"] != "input" and edge["target"] != "logits":
            assert before(graph, edge["source"], edge["target"])


def test_there_are_a_dozen_configs_and_one_is_ioi() -> None:
    assert len(siit.configs.names()) >= 12 and "ioi" in siit.configs.names()
    with pytest.raises(MethodError, match="other values of d_model"):
        siit.SiitConfig(graph="ioi", d_model=30)


def test_an_alignment_that_cannot_be_is_refused(ioi_task: Task) -> None:
    causal, graph = ioi_task.causal, ioi_task.swapper.graph
    places = {"duplicate_token": "a0.h0", "s_inhibition": "a1.h0", "name_mover": "a2.h0"}

    def check(**changed: str) -> None:
        made = [Place(nodes=(node,), variables=(name,)) for name, node in {**places, **changed}.items()]
        Alignment(places=tuple(made)).check(causal, graph)

    check()
    check(s_inhibition="m0")  # an MLP reads the heads of its own layer
    with pytest.raises(MethodError, match="cannot read duplicate_token"):
        check(s_inhibition="a0.h1")
    with pytest.raises(MethodError, match="each node one"):
        check(s_inhibition="a0.h0")
    with pytest.raises(MethodError, match="unknown source"):
        check(name_mover="a9.h0")
    with pytest.raises(MethodError, match="needs more layers"):
        align(causal, n_heads=4, n_layers=2)


# --- swapping


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_swapping_equals_interventions_of_the_library(family: Any) -> None:
    config = dataclasses.replace(SMALL, family=family, n_layers=2)
    causal = causal_graph(config)
    task = Task(causal, make_model(config, causal), align(causal, n_heads=2))
    one, other = (task.ids(causal.sample(6, seeded(seed))) for seed in (1, 2))
    swapper, model = task.swapper, task.model
    with torch.no_grad():
        plain, writes = swapper.record(one)[0], swapper.record(other)[1]
        assert torch.equal(plain, model.hf(input_ids=one).logits)
        assert torch.equal(plain, swapper.swapped(one, writes, swapper.rows(6, [[]] * 6)))
        wanted = [["a0.h1"], ["m0"], ["a1.h0", "m1"], [], ["a0.h0", "a0.h1"], ["m1"]]
        found = swapper.swapped(one, writes, swapper.rows(6, wanted))
    sites = {"a0.h0": "z.0.h0", "a0.h1": "z.0.h1", "a1.h0": "z.1.h0", "m0": "mlp_out.0", "m1": "mlp_out.1"}
    theirs = model.run(other, capture=list(sites.values()), logits="none")
    for row, nodes in enumerate(wanted):
        edits = [replace(sites[node], theirs[sites[node]][row : row + 1]) for node in nodes]
        expected = model.run(one[row : row + 1], interventions=edits).logits
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)
        assert (row == 3) == torch.allclose(found[row], plain[row])


def test_the_strict_loss_reaches_only_what_can_carry_it(ioi_task: Task) -> None:
    """What a swapped head does on the prompt itself cannot be blamed: its own value there gets no gradient, its output
    matrix does, and so do all other nodes.
    """
    swapper, causal = ioi_task.swapper, ioi_task.causal
    for weight in ioi_task.model.hf.parameters():
        weight.requires_grad_(True)
    inputs = causal.sample(8, seeded())
    rows = swapper.rows(8, [["a1.h0"]] * 8)
    _, writes = swapper.record(ioi_task.ids(causal.partners(inputs, seeded(1))))

    def gradients(source: Any) -> dict[str, torch.Tensor]:
        ioi_task.model.hf.zero_grad(set_to_none=True)
        logits = swapper.swapped(ioi_task.ids(inputs), source, rows)
        ioi_task.loss(logits, causal.run(inputs)[causal.output]).backward()
        named = ioi_task.model.hf.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    detached = gradients(writes.detached())
    d, k = 16, 4
    qkv = detached["transformer.h.1.attn.c_attn.weight"]  # [D, 3 D], heads side by side
    for part in range(3):
        own = qkv[:, part * d : part * d + k]
        assert torch.equal(own, torch.zeros_like(own))
        assert qkv[:, part * d + k : (part + 1) * d].abs().max() > 0
    assert detached["transformer.h.1.attn.c_proj.weight"][:k].abs().max() > 0
    assert detached["transformer.h.0.attn.c_attn.weight"].abs().max() > 0
    through = gradients(writes)["transformer.h.1.attn.c_attn.weight"]
    assert through[:, 2 * d : 2 * d + k].abs().max() > 0  # in the run that the values come from
    for weight in ioi_task.model.hf.parameters():
        weight.requires_grad_(False)


def test_rows_of_the_strict_loss_swap_nodes_outside_only(ioi_task: Task) -> None:
    rows = draw_outside(ioi_task, 200, 0.5, seeded())
    inside = ioi_task.swapper.mask(ioi_task.alignment.inside())
    assert not bool((rows & inside).any())
    count = rows.sum(dim=1)
    assert set(count.tolist()) == {1, len(ioi_task.swapper.nodes) - 3}
    assert 0.35 < (count > 1).float().mean() < 0.65


# --- training and checks


def test_training_passes_its_checks(trained: tuple[siit.Siit, Path]) -> None:
    made, _ = trained
    first, last = made.history[0], made.history[-1]
    assert last["behavior"] < first["behavior"] / 2 and last["iit"] < first["iit"] and last["strict"] < first["strict"]
    facts = made.report.facts
    assert facts["passed"] and facts["iia"] >= 0.98 and facts["outside"] <= 0.01, facts
    nodes = made.report.tables["nodes"]
    inside = nodes.filter(pl.col("role") == "inside")
    assert inside.height == 2 and inside["moved"].min() > 0.3  # what was tested does move answers
    assert set(nodes["role"]) == {"model", "inside", "all inside", "outside"}
    assert ((nodes["lo"] <= nodes["accuracy"]) & (nodes["accuracy"] <= nodes["hi"])).all()
    assert made.report.chart().to_dict()


def test_a_wrong_alignment_fails_the_checks(trained: tuple[siit.Siit, Path]) -> None:
    made, _ = trained
    right = made.alignment.nodes_of("before")[0]
    other = "a0.h0" if right == "a0.h1" else "a0.h1"
    wrong = Alignment.from_list(
        [{"nodes": [other], "variables": ["before"]}, {"nodes": ["m0"], "variables": ["repeats"]}]
    )
    report = siit.check(Task(made.causal, made.model, wrong), n=200)
    rows = {row["node"]: row for row in report.tables["nodes"].to_dicts()}
    assert not report.facts["passed"]
    assert rows[other]["accuracy_moved"] < 0.1, "a head that does nothing cannot give the other run's answer"
    assert rows[right]["role"] == "outside" and rows[right]["accuracy"] < 0.5, "a true node is no node outside"


def test_a_node_outside_that_matters_is_found(trained: tuple[siit.Siit, Path]) -> None:
    made, folder = trained
    again = siit.load(folder)
    right = again.alignment.nodes_of("before")[0]
    other = 0 if right == "a0.h1" else 1
    with torch.no_grad():  # let the head outside write its values, enlarged, into the stream
        slot = slice(other * 16, other * 16 + 16)
        again.model.hf.transformer.h[0].attn.c_proj.weight[slot] = torch.randn(16, 32) * 3
    report = again.check(n=200)
    assert report.facts["outside"] > 0.1 and not report.facts["passed"]
    assert report.facts["shift_outside"] > made.report.facts["shift_outside"]


def test_an_untrained_model_fails_the_checks() -> None:
    run = Training(SMALL)
    seen = quick_check(run.task, 200, seed=0)
    assert seen["iia"] < 0.5 and seen["accuracy"] < 0.5


def test_the_same_config_gives_the_same_weights_also_when_stopped(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, steps=24, check_every=8, check_rows=32, batch=16)

    def weights(run: Training) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in run.weights]

    whole, stopped = Training(config), Training(config)
    whole.run()
    stopped.run(tmp_path, stop_at=16)
    later = Training(config)
    assert later.resume(tmp_path) and later.step == 16
    later.run(tmp_path)
    for one, other in zip(weights(whole), weights(later), strict=True):
        assert torch.equal(one, other)
    assert [row["iit"] for row in whole.history] == [row["iit"] for row in later.history]
    later.finish()
    for one, other in zip(later.average, later.weights, strict=True):
        assert torch.equal(one, other) and not other.requires_grad
    other = Training(dataclasses.replace(config, seed=1))
    assert not torch.equal(weights(Training(config))[0], weights(other)[0])
    with pytest.raises(StoreError, match="another training run"):
        other.resume(tmp_path)
    (tmp_path / "training" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="is damaged"):
        Training(config).resume(tmp_path)


def test_running_means_of_the_weights_are_what_is_kept() -> None:
    """By definition: the mean of what the weights were after each step, each step counting 1 - average of the rest."""
    config = dataclasses.replace(SMALL, steps=20, check_every=20, check_rows=16, batch=8, average=0.9)
    run = Training(config)
    wanted = run.weights[0].detach().clone()
    for step in range(1, 21):
        run._step()
        share = min(0.9, step / (step + 10))
        wanted = share * wanted + (1 - share) * run.weights[0].detach()
    torch.testing.assert_close(run.average[0], wanted)
    last = run.weights[0].detach().clone()
    with run.averaged():
        assert torch.equal(run.weights[0], run.average[0])
    assert torch.equal(run.weights[0], last) and not torch.equal(last, wanted)
    plain = Training(dataclasses.replace(config, average=0.0))
    plain._step()
    assert torch.equal(plain.average[0], plain.weights[0])


def test_losses_are_those_of_their_definitions(ioi_task: Task) -> None:
    """Each loss against a plain loop over rows with the library's interventions."""
    config = siit.SiitConfig(graph="ioi", length=14, n_layers=3, d_model=16, d_mlp=16, batch=12)
    found = losses(ioi_task, config, seeded(5))
    generator = seeded(5)
    causal, model = ioi_task.causal, ioi_task.model
    from headwater.bench.siit.training import draw_places

    inputs = causal.sample(12, generator)
    partners = causal.partners(inputs, generator)
    places = draw_places(6, 3, generator)
    strict = draw_outside(ioi_task, 6, config.both, generator)
    values = causal.run(partners)

    def said(ids: torch.Tensor, nodes: list[str], other: torch.Tensor) -> torch.Tensor:
        sites = {n: f"z.{n[1]}.h{n[4]}" if n.startswith("a") else f"mlp_out.{n[1]}" for n in nodes}
        theirs = model.run(other[None], capture=list(sites.values()), logits="none")
        edits = [replace(site, theirs[site]) for site in sites.values()]
        return model.run(ids[None], interventions=edits, logits="last").logits[0].log_softmax(-1)

    ids, other = ioi_task.ids(inputs), ioi_task.ids(partners)
    names = [place.nodes[0] for place in ioi_task.alignment.places]
    iit, kept = [], []
    for row in range(6):
        chosen = [i for i in range(3) if places[row, i]]
        rows = {ioi_task.alignment.places[i].variables[0]: torch.ones(12, dtype=torch.bool) for i in chosen}
        answer = causal.run(inputs, Swap(values=values, rows=rows))["name_mover"][row, -1]
        iit.append(-said(ids[row], [names[i] for i in chosen], other[row])[ioi_task.answer_ids[answer]])
        nodes = [node for node, yes in zip(ioi_task.swapper.nodes, strict[row].tolist(), strict=True) if yes]
        answer = causal.run(inputs)["name_mover"][6 + row, -1]
        kept.append(-said(ids[6 + row], nodes, other[6 + row])[ioi_task.answer_ids[answer]])
    torch.testing.assert_close(found["iit"].detach(), torch.stack(iit).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["strict"].detach(), torch.stack(kept).mean(), atol=1e-4, rtol=1e-4)


# --- what is stored, and what is known


def test_a_folder_is_a_model_a_mechanism_and_checks(trained: tuple[siit.Siit, Path]) -> None:
    made, folder = trained
    model = hw.load(folder)
    pairs = made.behavior(12)
    assert torch.equal(model.run(pairs.prompts).logits, made.model.run(pairs.prompts).logits)
    assert (folder / "mechanism.json").is_file()
    again = siit.load(folder)
    assert again.report.content_hash == made.report.content_hash
    assert again.check(n=100).tables["nodes"].equals(made.check(n=100).tables["nodes"])
    from headwater.bench import truth

    _, mechanism = truth.load(folder)
    assert mechanism.content_hash == made.mechanism.content_hash
    assert mechanism.circuit(model).nodes[0] == "input"
    assert hw.Circuit.from_json(folder / "mechanism.json", model=model).n_edges == mechanism.circuit().n_edges
    assert isinstance(load_result(folder / "report"), siit.SiitReport)


def test_the_mechanism_is_the_alignment(ioi_task: Task) -> None:
    from headwater.bench.siit.truth import name_truth

    mechanism = name_truth(ioi_task, name="ioi")
    duplicate, inhibition, mover = (ioi_task.alignment.nodes_of(v)[0] for v in ioi_task.causal.variables)
    edges = {(row["source"], row["target"]) for row in mechanism.tables["edges"].to_dicts() if row["live"]}
    assert edges == {
        ("input", duplicate), (duplicate, inhibition), ("input", mover), (inhibition, mover), (mover, "logits"),
    }  # fmt: skip
    assert set(mechanism.live_nodes) == {"input", duplicate, inhibition, mover}
    graph = mechanism.graph
    assert bool(mechanism.tensors["mask"][graph.edge(f"{duplicate}->{inhibition}<q>")])
    # the inhibition head may take positions from the embedding, so nothing is known of that edge
    assert bool(mechanism.tensors["unscored"][graph.edge(f"input->{inhibition}<k>")])
    assert not bool((mechanism.tensors["unscored"] & mechanism.tensors["mask"]).any())


def test_pairs_are_answered_as_the_causal_graph_says(trained: tuple[siit.Siit, Path]) -> None:
    made, _ = trained
    pairs = made.behavior(40, seed=1)
    assert pairs.n == 40 and made.behavior(40, seed=1) == pairs != made.behavior(40, seed=2)
    bound = pairs.bind(made.model)
    assert bound.n == 40
    report = hw.behavior.evaluate(made.model, pairs, metrics=["accuracy"], canary=False)
    assert report.value("accuracy") == 1.0
    swap = IOI()
    behavior = siit.pairs(swap, 30)
    for row in behavior.frame.to_dicts():
        spans = json.loads(row["positions"])
        said = {name: row["prompt"][a:b] for name, (a, b) in spans.items()}
        assert said["S1"] == said["S2"] != said["IO"] == row["answers"][0].strip() and said["END"] == "to"
        assert row["foils"] == [f" {said['S2']}"]


def test_auroc_is_the_chance_to_rank_a_true_one_higher() -> None:
    rng = random.Random(0)
    scores = [rng.choice([0.0, 0.1, 0.5, 0.9]) for _ in range(60)]
    true = [rng.random() < 0.3 for _ in scores]
    pairs = [(a > b) + (a == b) / 2 for a, x in zip(scores, true, strict=True) if x
             for b, y in zip(scores, true, strict=True) if not y]  # fmt: skip
    assert auroc(scores, true) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc([1.0, 2.0], [True, True]) != auroc([1.0, 2.0], [True, True])  # nan: nothing to compare with


def test_methods_recover_the_known_circuit(trained: tuple[siit.Siit, Path]) -> None:
    made, _ = trained
    pairs = made.behavior(48)
    found = siit.recovery(hw.localize.eap_ig(made.model, pairs, steps=5), made.mechanism)
    assert found.facts["node_auroc"] == 1.0 and found.facts["edge_auroc"] >= 0.9
    patched = siit.recovery(hw.localize.patch(made.model, pairs, sites=["head", "mlp_out"]), made.mechanism)
    assert patched.facts["node_auroc"] == 1.0 and patched.facts["edge_auroc"] is None
    assert found.chart().to_dict()
    with pytest.raises(MethodError, match="no scores of nodes"):
        siit.recovery(made.report, made.mechanism)


# --- InterpBench's folders


def hooked_state(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    g = seeded(seed)
    d, h, k, m = (config[name] for name in ("d_model", "n_heads", "d_head", "d_mlp"))

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.4

    state = {"embed.W_E": r(config["d_vocab"], d), "pos_embed.W_pos": r(config["n_ctx"], d)}
    for i in range(config["n_layers"]):
        b = f"blocks.{i}"
        for letter in "QKV":
            state |= {f"{b}.attn.W_{letter}": r(h, d, k), f"{b}.attn.b_{letter}": r(h, k)}
        state |= {f"{b}.attn.W_O": r(h, k, d), f"{b}.attn.b_O": r(d), f"{b}.mlp.W_in": r(d, m), f"{b}.mlp.b_in": r(m)}
        state |= {f"{b}.mlp.W_out": r(m, d), f"{b}.mlp.b_out": r(d), f"{b}.attn.IGNORE": torch.tensor(-1e5)}
        state[f"{b}.attn.mask"] = torch.tril(torch.ones(config["n_ctx"], config["n_ctx"])).bool()
        if config["normalization_type"] == "LN":
            state |= {f"{b}.{n}.w": 1 + r(d) for n in ("ln1", "ln2")} | {f"{b}.{n}.b": r(d) for n in ("ln1", "ln2")}
    if config["normalization_type"] == "LN":
        state |= {"ln_final.w": 1 + r(d), "ln_final.b": r(d)}
    return state | {"unembed.W_U": r(d, config["d_vocab_out"]), "unembed.b_U": r(config["d_vocab_out"])}


def hooked_logits(state: dict[str, torch.Tensor], config: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """A HookedTransformer's forward, from its definition."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if config["normalization_type"] is None:
            return x
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config["eps"]).sqrt()
        return x * state[f"{name}.w"] + state[f"{name}.b"] if config["normalization_type"] == "LN" else x

    t = ids.shape[1]
    x = state["embed.W_E"][ids] + state["pos_embed.W_pos"][:t]
    for i in range(config["n_layers"]):
        b = f"blocks.{i}"
        entering = norm(x, f"{b}.ln1")
        q, k, v = (
            torch.einsum("btd,hdk->bhtk", entering, state[f"{b}.attn.W_{c}"]) + state[f"{b}.attn.b_{c}"][:, None]
            for c in "QKV"
        )
        scores = q @ k.transpose(-1, -2) / config["d_head"] ** 0.5
        if config["attention_dir"] == "causal":
            scores = scores.masked_fill(~torch.ones(t, t).tril().bool(), -1e9)
        mixed = scores.softmax(-1) @ v
        x = x + torch.einsum("bhtk,hkd->btd", mixed, state[f"{b}.attn.W_O"]) + state[f"{b}.attn.b_O"]
        hidden = torch.nn.functional.gelu(norm(x, f"{b}.ln2") @ state[f"{b}.mlp.W_in"] + state[f"{b}.mlp.b_in"])
        x = x + hidden @ state[f"{b}.mlp.W_out"] + state[f"{b}.mlp.b_out"]
    return norm(x, "ln_final") @ state["unembed.W_U"] + state["unembed.b_U"]


HOOKED = {
    "n_layers": 2, "n_heads": 4, "d_model": 12, "d_head": 3, "d_mlp": 20, "n_ctx": 10, "d_vocab": 9, "d_vocab_out": 5,
    "act_fn": "gelu", "eps": 1e-5, "normalization_type": None, "attention_dir": "causal", "use_attn_scale": True,
    "positional_embedding_type": "standard", "attn_only": False,
}  # fmt: skip
EDGES = [
    ("hook_embed", "blocks.0.hook_q_input[1]"),
    ("hook_pos_embed", "blocks.0.hook_k_input[1]"),
    ("blocks.0.hook_q_input[1]", "blocks.0.attn.hook_q[1]"),
    ("blocks.0.attn.hook_q[1]", "blocks.0.attn.hook_result[1]"),
    ("blocks.0.attn.hook_result[1]", "blocks.1.hook_mlp_in"),
    ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"),
    ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"),
]


def write_folder(folder: Path, config: dict[str, Any], **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(hooked_state(config), folder / "ll_model_510.pth")
    (folder / "meta_510.json").write_text('{"epochs": 510}')
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "changed",
    [{}, {"normalization_type": "LN"}, {"normalization_type": "LNPre"}, {"attention_dir": "bidirectional"}],
    ids=lambda changed: "-".join(map(str, changed.values())) or "plain",
)
def test_an_interpbench_folder_gives_the_models_own_logits(tmp_path: Path, changed: dict[str, Any]) -> None:
    config = HOOKED | changed
    folder = write_folder(
        tmp_path / "11", config, edges__pkl=pickle.dumps(EDGES), ll_model_cfg_510__json=json.dumps(config).encode()
    )
    found = siit.load_interpbench(folder)
    ids = torch.randint(9, (4, 8), generator=seeded())
    expected = hooked_logits(hooked_state(config), config, ids)
    torch.testing.assert_close(found.model.run(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert set(zip(*(found.circuit.tables["edges"][c] for c in ("source", "target")), strict=True)) == {
        ("input", "a0.h1<q>"), ("input", "a0.h1<k>"), ("a0.h1", "m1"), ("m1", "logits"),
    }  # fmt: skip
    assert bool(found.mechanism.tensors["mask"][found.mechanism.graph.edge("input->a0.h1<v>")])  # head granularity
    assert found.mechanism.live_nodes == ["input", "a0.h1", "m1"] and found.meta == {"epochs": 510}
    assert hw.localize.graph_of(found.model).n_edges == found.circuit.graph.n_edges
    with torch.no_grad():
        found.model.hf.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(hw.load(tmp_path / "saved").run(ids).logits, expected, atol=1e-5, rtol=1e-5)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this would have run",))


def test_nothing_in_an_interpbench_folder_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.dumps({"transformer_cfg": HOOKED}).encode()
    evil = pickle.dumps([("a", Evil())])
    folder = write_folder(tmp_path / "edges", HOOKED, edges__pkl=evil, ll_config__json=config)
    with pytest.raises(StoreError, match="runs no code"):
        siit.load_interpbench(folder)
    objects = {"edges__pkl": pickle.dumps(EDGES), "ll_model_cfg__pkl": pickle.dumps(Evil())}
    folder = write_folder(tmp_path / "config", HOOKED, **objects)
    with pytest.raises(StoreError, match="pickled object"):
        siit.load_interpbench(folder)
    assert siit.load_interpbench(folder, config=HOOKED).circuit.n_edges == 4
    torch.save({"embed.W_E": Evil()}, folder / "ll_model_510.pth")
    with pytest.raises(StoreError, match="no file of weights alone"):
        siit.load_interpbench(folder, config=HOOKED)
    assert "would have run" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_read_in_every_protocol(protocol: int) -> None:
    from headwater.bench.siit.plain_pickle import read_plain

    shared = ("blocks.0.hook_q_input[1]", "é")
    value = [shared, shared, ["x", 1, -300, 2**40, 1.5, None, True, False], {"a": {"b": (1, 2, 3, 4)}}, ()]
    assert read_plain(pickle.dumps(value, protocol=protocol), what="a file") == value


@pytest.mark.parametrize("data", [b"", b"junk", b"\x80\x04]", b"(lp0\n", b".", b"\x80\x04a."])
def test_broken_pickles_are_refused(data: bytes) -> None:
    from headwater.bench.siit.plain_pickle import read_plain

    with pytest.raises(StoreError, match="no whole pickle"):
        read_plain(data, what="edges.pkl")


def test_what_an_interpbench_model_has_and_this_reader_has_not_is_named(tmp_path: Path) -> None:
    from headwater.bench.siit.interpbench import to_transformers

    with pytest.raises(ModelError, match="positional_embedding_type"):
        to_transformers(hooked_state(HOOKED), HOOKED | {"positional_embedding_type": "rotary"})
    with pytest.raises(ModelError, match="do not make"):
        to_transformers(hooked_state(HOOKED), HOOKED | {"d_mlp": 7})
    folder = write_folder(
        tmp_path, HOOKED, edges__json=b'[["a9.h9", "logits"]]', ll_model_cfg__json=json.dumps(HOOKED).encode()
    )
    with pytest.raises(StoreError, match="not known"):
        siit.load_interpbench(folder)


@pytest.fixture(scope="session")
def ioi_trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[siit.Siit, Path]:
    """Some minutes on a quiet core: the shipped recipe of IOI."""
    folder = tmp_path_factory.mktemp("siit") / "ioi"
    return siit.train("ioi", out=folder), folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ioi_is_trained(ioi_trained: tuple[siit.Siit, Path]) -> None:
    made, folder = ioi_trained
    facts = made.report.facts
    assert facts["passed"] and facts["iia"] >= 0.99 and facts["outside"] <= 0.01, facts
    assert load_result(folder / "report").facts["passed"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_circuit_of_ioi_is_recovered(ioi_trained: tuple[siit.Siit, Path]) -> None:
    made, _ = ioi_trained
    pairs = made.behavior(64)
    options: dict[str, dict[str, Any]] = {"eap_ig": {}, "acdc": {}, "patch": {"sites": ["head", "mlp_out"]}}
    for method, given in options.items():
        found = siit.recovery(hw.localize.methods.get(method)(made.model, pairs, **given), made.mechanism)
        assert found.facts["node_auroc"] == 1.0 and found.facts["node_precision"] == 1.0, (method, found)
        if method != "patch":
            edges = found.tables["edges"].sort(pl.col("score").abs(), descending=True)
            assert edges["true"].head(4).all(), (method, edges)
            # the fifth brings the mover the names, and those are the same in both prompts of a pair
            (unseen,) = edges.slice(4).filter("true").select("source", "target").rows()
            assert unseen[0] == "input"
