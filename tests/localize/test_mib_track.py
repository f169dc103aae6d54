"""The circuit track against its own definitions, one circuit at a time; AUROC by counting; discovery curves."""

import itertools
import json

import polars as pl
import pytest
import torch

import headwater as hw
from headwater.core.errors import MethodError
from headwater.core.results import load_result
from headwater.localize.attribution.atp import atp
from headwater.localize.attribution.eap import eap, eap_ig
from headwater.localize.circuit import Circuit
from headwater.localize.engine.wiring import graph_of
from headwater.localize.graph import Graph
from headwater.localize.judging.circuit_track import auroc, budget, mib_track, passes_of, scores_of
from headwater.localize.judging.discovery import discovery_curve
from headwater.localize.judging.faithfulness import curve as curve_of
from headwater.localize.judging.mib import FRACTIONS, areas, from_mib, read_json, to_mib
from headwater.localize.patching.patch import patch

GRAPH = Graph(n_layers=2, n_heads=4, n_kv_heads=2)


@pytest.fixture(scope="module")
def tasks():
    return {"ioi": hw.behavior("ioi", n=12, seed=0), "sums": hw.behavior("mib_arithmetic", n=12, seed=0, digits=1)}


def test_each_row_is_the_curve_of_its_own_circuits(tiny_model64, tasks, tmp_path) -> None:
    result = mib_track(
        tiny_model64, tasks={"ioi": tasks["ioi"]}, methods={"eap_ig": {"steps": 2}, "eap": {}},
        ablations=["counterfactual", "zero"], fractions=FRACTIONS,
    )  # fmt: skip
    table = result.to_frame()
    assert set(table.select("method", "rank", "ablation").rows()) == set(
        itertools.product(("eap_ig", "eap", "random"), ("abs", "signed"), ("counterfactual", "zero"))
    )
    scores = eap_ig(tiny_model64, tasks["ioi"], steps=2)
    for rank, ablation in itertools.product(("abs", "signed"), ("counterfactual", "zero")):
        own = curve_of(scores.graph, scores.scores, tiny_model64, tasks["ioi"].test, rank=rank, ablation=ablation)
        row = table.filter(method="eap_ig", rank=rank, ablation=ablation).row(0, named=True)
        assert row["cpr"] == pytest.approx(own.facts["cpr"], rel=1e-9)
        assert row["cmd"] == pytest.approx(own.facts["cmd"], rel=1e-9)
        curve = result.tables["curve"].filter(method="eap_ig", rank=rank, ablation=ablation)
        assert curve["faithfulness"].to_list() == pytest.approx(own.tables["curve"]["faithfulness"].to_list())
        assert curve["asked"].to_list() == own.tables["curve"]["asked"].to_list()
        assert curve["faithfulness"][-1] == pytest.approx(1.0)
    first = table.filter(method="eap_ig").row(0, named=True)
    assert (first["forward"], first["backward"], first["n"]) == (3.0 * 6, 2.0 * 6, 6)
    # a random ranking is scored thrice and shown once
    random = table.filter(method="random", rank="abs", ablation="counterfactual")
    assert random.height == 1
    drawn = []
    for draw in range(3):
        values = torch.rand(
            graph_of(tiny_model64).allowed.shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64
        )
        drawn.append(
            Circuit.build(graph_of(tiny_model64), graph_of(tiny_model64).allowed, values, model=tiny_model64)
            .curve(tasks["ioi"].test)
            .facts["cmd"]
        )
    assert random["cmd"][0] == pytest.approx(sum(drawn) / 3, rel=1e-9)
    result.save(tmp_path / "r")
    assert load_result(tmp_path / "r").content_hash == result.content_hash
    # the submission holds every edge with its score, and comes back
    files = result.submission(tmp_path / "s")
    assert [file.name for file in files] == ["eap_ig_ioi.json", "eap_ioi.json"]
    again = Circuit.from_json(files[0], model=tiny_model64)
    torch.testing.assert_close(again.scores, result.scores("ioi", "eap_ig"), rtol=1e-12, atol=1e-15)


def test_node_budgets_keep_the_edges_among_the_best_nodes(tiny_model64, tasks) -> None:
    result = mib_track(
        tiny_model64, tasks={"ioi": tasks["ioi"]}, methods=["atp", "eap"], ranks=["abs"], level="node",
        fractions=(0.1, 0.5, 1.0),
    )  # fmt: skip
    scores = atp(tiny_model64, tasks["ioi"]).tensors["node_scores"]
    graph = graph_of(tiny_model64)
    best = [graph.sources[i] for i in torch.argsort(scores.abs(), descending=True)[: len(graph.sources) // 2]]
    by_hand = Circuit.from_nodes(graph, best, model=tiny_model64).faithfulness(tasks["ioi"].test).value
    curve = result.tables["curve"].filter(method="atp")
    assert curve["faithfulness"].to_list()[1] == pytest.approx(by_hand, rel=1e-9)
    assert curve["asked"].to_list() == [int(f * len(graph.sources)) for f in (0.1, 0.5, 1.0)]
    # a node's score is the sum of its edges', so EAP and AtP rank nodes alike
    assert result.to_frame().filter(method="eap")["cmd"][0] == pytest.approx(
        result.to_frame().filter(method="atp")["cmd"][0]
    )
    with pytest.raises(MethodError, match="scores no edges"):
        mib_track(tiny_model64, tasks={"ioi": tasks["ioi"]}, methods=["atp"])


def test_budgets_round_as_mib_does() -> None:
    scores = torch.arange(len(GRAPH.sources), dtype=torch.float64) - 3
    for fraction in (0.0, 0.3, 0.55, 1.0):
        n = int(fraction * len(GRAPH.sources))
        for rank, value in (("abs", scores.abs()), ("signed", scores)):
            best = [GRAPH.sources[i] for i in torch.argsort(value, descending=True, stable=True)[:n]]
            from headwater.localize.selection import prune

            expected = prune(GRAPH, Circuit.from_nodes(GRAPH, best).mask)
            assert torch.equal(budget(GRAPH, scores, fraction, level="node", rank=rank), expected)
    with pytest.raises(MethodError, match="do not fit"):
        budget(GRAPH, scores[:-1], 0.5, level="node")
    with pytest.raises(MethodError, match="ranking"):
        budget(GRAPH, scores, 0.5, level="node", rank="up")  # type: ignore[arg-type]


def test_several_tasks_in_one_table_and_what_cannot_be_run(tiny_model64, tasks) -> None:
    result = mib_track(tiny_model64, tasks=tasks, methods=["eap", "random"], ranks=["abs"], fractions=(0.1, 1.0))
    assert result.to_frame().select("task", "method").rows() == [
        ("ioi", "eap"), ("ioi", "random"), ("sums", "eap"), ("sums", "random"),
    ]  # fmt: skip
    for wrong in ({"methods": ["nosuch"]}, {"methods": ["eap"], "level": "layer"}, {"methods": []}, {"tasks": {}}):
        with pytest.raises(MethodError):
            mib_track(tiny_model64, **({"tasks": tasks} | wrong))
    with pytest.raises(MethodError, match="no such scores"):
        result.scores("ioi", "eap_ig")


def test_a_published_submission_round_trips(shared_data, tmp_path) -> None:
    path = shared_data / "mib" / "gpt2_ioi-eap-ig_circuit.json"
    if not path.exists():
        pytest.skip(f"no submission at {path}")
    graph, mask, scores = from_mib(read_json(path))
    given = json.loads(path.read_text())
    assert (graph.n_layers, graph.n_heads, graph.n_edges) == (12, 12, 32491)
    assert int(mask.sum()) == 756
    assert to_mib(graph, mask, scores, per_head=True)["edges"] == given["edges"]
    circuit = Circuit.from_json(path)
    circuit.to_json(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["edges"] == given["edges"]
    assert again["cfg"] == given["cfg"]
    ours = {name for name, node in again["nodes"].items() if node["in_graph"]}
    theirs = {name for name, node in given["nodes"].items() if node["in_graph"]}
    assert ours == theirs


# --- AUROC


def test_auroc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, GRAPH.allowed.shape, generator=generator).double()
    truth = (torch.rand(GRAPH.allowed.shape, generator=generator) < 0.2) & GRAPH.allowed
    for rank in ("abs", "signed"):
        value = scores.abs() if rank == "abs" else scores
        inside, outside = value[truth & GRAPH.allowed], value[~truth & GRAPH.allowed]
        wins = (inside[:, None] > outside).double().mean() + 0.5 * (inside[:, None] == outside).double().mean()
        assert auroc(scores, truth, graph=GRAPH, rank=rank) == pytest.approx(float(wins))
    assert auroc(truth.double(), truth, graph=GRAPH) == 1.0
    assert auroc(1 - truth.double(), truth, graph=GRAPH) == 0.0
    assert auroc(torch.zeros(4), torch.tensor([1, 0, 0, 1])) == 0.5
    with pytest.raises(MethodError, match="inside and outside"):
        auroc(torch.zeros(4), torch.zeros(4))
    with pytest.raises(MethodError, match="shape"):
        auroc(torch.zeros(4), torch.zeros(3))


# --- what finding costs


def test_passes_are_what_a_method_ran(tiny_model64, tasks) -> None:
    ioi, n = tasks["ioi"], 6
    assert passes_of(eap(tiny_model64, ioi)) == {"forward": 2.0 * n, "backward": 1.0 * n}
    assert passes_of(atp(tiny_model64, ioi)) == {"forward": 2.0 * n, "backward": 1.0 * n}
    assert passes_of(eap_ig(tiny_model64, ioi, steps=5)) == {"forward": 6.0 * n, "backward": 5.0 * n}
    assert passes_of(eap_ig(tiny_model64, ioi, steps=5, rule="gauss")) == {"forward": 7.0 * n, "backward": 5.0 * n}
    sites = patch(tiny_model64, ioi, sites="mlp_out")
    assert passes_of(sites) == {"forward": (2.0 + 3) * n, "backward": 0.0}
    said = eap(tiny_model64, ioi)
    said.facts["passes"] = {"forward": 7, "backward": 3}
    assert passes_of(said) == {"forward": 7.0, "backward": 3.0}
    del said.facts["passes"]
    said.facts["method"] = said.config["method"] = "someone_elses"
    assert passes_of(said) is None
    with pytest.raises(MethodError, match="scores no"):
        scores_of(sites, "node")


def test_a_discovery_curve_is_the_runs_it_is_made_of(tiny_model64, tasks, tmp_path) -> None:
    ioi = tasks["ioi"]
    reference = eap(tiny_model64, ioi).circuit(fraction=0.3)
    result = discovery_curve(
        tiny_model64, ioi, methods={"eap": {}, "eap_ig": [{"steps": 1}, {"steps": 3}]}, pairs=(2, 6, 99),
        reference=reference, fraction=0.3,
    )  # fmt: skip
    table = result.to_frame()
    assert table.select("method", "options", "pairs").rows() == [
        ("eap", "", 2), ("eap", "", 6), ("eap_ig", "steps=1", 2), ("eap_ig", "steps=1", 6), ("eap_ig", "steps=3", 2),
        ("eap_ig", "steps=3", 6), ("random", "", 0),
    ]  # fmt: skip
    whole = table.filter((pl.col("method") == "eap") & (pl.col("pairs") == 6)).row(0, named=True)
    scores = eap(tiny_model64, ioi)
    assert whole["cmd"] == pytest.approx(scores.curve(ioi.test).facts["cmd"], rel=1e-9)
    assert whole["overlap"] == 1.0 and whole["passes"] == 18.0
    own = scores.circuit(fraction=0.3).faithfulness(ioi.test).value
    assert whole["closeness"] == pytest.approx(1 - abs(1 - own), rel=1e-9)
    few = table.filter((pl.col("method") == "eap_ig") & (pl.col("options") == "steps=3") & (pl.col("pairs") == 2))
    expected = eap_ig(tiny_model64, ioi.train[:2], steps=3).curve(ioi.test)
    assert few["cmd"][0] == pytest.approx(expected.facts["cmd"], rel=1e-9)
    assert few["cpr"][0] == pytest.approx(areas(expected.tables["curve"]["faithfulness"].to_list())[0], rel=1e-9)
    result.save(tmp_path / "d")
    assert load_result(tmp_path / "d").content_hash == result.content_hash
    with pytest.raises(MethodError):
        discovery_curve(tiny_model64, ioi, pairs=(0,))
    with pytest.raises(MethodError, match="neither"):
        discovery_curve(tiny_model64, ioi, methods=["atp"], pairs=(2,))
