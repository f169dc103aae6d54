"""Graph, selection, pruning, MIB's JSON and areas: against hand-made and published values."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.core.errors import MethodError, StoreError
from headwater.localize.circuit import Circuit
from headwater.localize.graph import Graph
from headwater.localize.judging import mib
from headwater.localize.judging.nulls import p_value, random_circuits
from headwater.localize.selection import greedy, prune, select, top_n

SMALL = Graph(n_layers=2, n_heads=4, n_kv_heads=2)
PLAIN = Graph(n_layers=2, n_heads=2, n_kv_heads=2)


def plain_edges(graph: Graph) -> set[str]:
    """The edges by the definition, spelled out: who acts before whom."""
    edges: set[str] = set()
    written = ["input"]
    letter = "h" if graph.n_heads == graph.n_kv_heads else "g"
    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{h}" for h in range(graph.n_heads)]
        readers = [f"{head}<q>" for head in heads]
        readers += [f"a{layer}.{letter}{g}<{part}>" for part in "kv" for g in range(graph.n_kv_heads)]
        mlp_reads = written if graph.parallel else written + heads
        edges |= {f"{s}->{r}" for s in written for r in readers} | {f"{s}->m{layer}" for s in mlp_reads}
        written = [*written, *heads, f"m{layer}"]
    return edges | {f"{s}->logits" for s in written}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (4, 2), (4, 1)])
def test_edges_are_those_of_the_definition(heads: int, kv: int, parallel: bool) -> None:
    graph = Graph(n_layers=3, n_heads=heads, n_kv_heads=kv, parallel=parallel)
    named = {f"{s}->{r}" for s, r in graph.edge_names(graph.allowed)}
    assert named == plain_edges(graph)
    for layer in range(3):
        assert graph.sources[graph.heads_at(layer)] == tuple(f"a{layer}.h{h}" for h in range(heads))
        assert graph.sources[graph.mlp_at(layer)] == f"m{layer}"
        assert graph.readers[graph.mlp_reader_at(layer)] == f"m{layer}"
    assert all(graph.edge(name) == graph.edge(name) and bool(graph.allowed[graph.edge(name)]) for name in named)


def test_a_key_of_a_query_head_is_the_shared_one() -> None:
    assert SMALL.reader("a1.h3<k>") == SMALL.reader("a1.g1<k>")
    assert [SMALL.sources[i] for i in SMALL.owners[:, SMALL.reader("a1.g1<v>")].nonzero().flatten()] == [
        "a1.h2",
        "a1.h3",
    ]


@pytest.mark.parametrize(
    ("edge", "says"),
    [
        ("a1.h0->a0.h0<q>", "does not come before"),
        ("a0.h0->a0.h0<v>", "does not come before"),
        ("a0.h9->m1", "unknown source"),
        ("m0->a1.h7<k>", "unknown reader"),
        ("m0", "source->reader"),
    ],
)
def test_an_edge_that_is_none_is_refused(edge: str, says: str) -> None:
    with pytest.raises(MethodError, match=says):
        SMALL.edge(edge)


def test_shapes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(MethodError, match="equal groups"):
        Graph(n_layers=2, n_heads=3, n_kv_heads=2)


# --- selection


def test_top_n_takes_the_largest_and_names_its_ranking() -> None:
    scores = torch.zeros(PLAIN.allowed.shape, dtype=torch.float64)
    scores[PLAIN.edge("input->logits")] = -3
    scores[PLAIN.edge("input->m0")] = 2
    assert PLAIN.edge_names(top_n(PLAIN, scores, 1, rank="abs")) == [("input", "logits")]
    assert PLAIN.edge_names(top_n(PLAIN, scores, 1, rank="signed")) == [("input", "m0")]
    assert int(top_n(PLAIN, scores, PLAIN.n_edges, rank="signed").sum()) == PLAIN.n_edges


def plain_greedy(graph: Graph, scores: torch.Tensor, n: int) -> set[tuple[str, str]]:
    """Greedy by its definition, looking through all edges at every step."""
    chosen: set[tuple[str, str]] = set()
    for _ in range(n):
        connected = {s for s, _ in chosen}
        candidates = [
            (float(scores[s, r].abs()), (graph.sources[s], graph.readers[r]))
            for s, r in graph.allowed.nonzero().tolist()
            if (graph.sources[s], graph.readers[r]) not in chosen
            and (
                graph.readers[r] == "logits"
                or connected & {graph.sources[u] for u in graph.owners[:, r].nonzero().flatten().tolist()}
            )
        ]
        if not candidates:
            break
        chosen.add(max(candidates)[1])
    return chosen


@pytest.mark.parametrize("graph", [PLAIN, SMALL], ids=["plain", "grouped"])
@pytest.mark.parametrize("n", [1, 5, 17])
def test_greedy_is_its_definition(graph: Graph, n: int) -> None:
    scores = torch.randn(graph.allowed.shape, dtype=torch.float64)
    assert set(graph.edge_names(greedy(graph, scores, n))) == plain_greedy(graph, scores, n)


def connected(graph: Graph, mask: torch.Tensor) -> bool:
    """Every edge lies on a path from input to logits (a head is entered by any of its readers)."""
    edges = graph.edge_names(mask)
    owned = {
        r: {graph.sources[u] for u in graph.owners[:, i].nonzero().flatten().tolist()}
        for i, r in enumerate(graph.readers)
    }
    entered, useful = {"input"}, set[str]()
    for _ in graph.sources:
        entered |= {u for s, r in edges if s in entered for u in owned[r]}
        useful |= {s for s, r in edges if r == "logits" or owned[r] & useful}
    return all(s in entered and s in useful and (r == "logits" or owned[r] & useful & entered) for s, r in edges)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.02, 0.6), grouped=st.booleans())
def test_pruning_leaves_what_is_connected_and_only_that(seed: int, density: float, grouped: bool) -> None:
    graph = SMALL if grouped else PLAIN
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(graph.allowed.shape, generator=generator) < density) & graph.allowed
    kept = prune(graph, mask)
    assert not bool((kept & ~mask).any())
    assert torch.equal(prune(graph, kept), kept)
    assert connected(graph, kept)


def test_a_dangling_chain_goes_whole() -> None:
    circuit = Circuit.from_edges(
        PLAIN, ["input->logits", "input->a0.h0<q>", "a0.h0->a1.h1<k>", "a0.h1->m1", "m1->logits"]
    )
    # a1.h1 leads nowhere, so a0.h0 dangles; a0.h1 is never entered, so m1 is not either
    assert PLAIN.edge_names(prune(PLAIN, circuit.mask)) == [("input", "logits")]


def test_sizes_and_ways_that_make_no_sense_are_refused() -> None:
    scores = torch.zeros(PLAIN.allowed.shape)
    for wrong in (
        {},
        {"edges": 3, "fraction": 0.1},
        {"edges": 10_000},
        {"fraction": 1.5},
        {"edges": 2, "how": "topm"},
        {"edges": 2, "rank": "absolute"},
        {"how": "threshold"},
        {"edges": 2, "threshold": 0.5},
    ):
        with pytest.raises(MethodError):
            select(PLAIN, scores, **wrong)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="NaN"):
        select(PLAIN, scores.fill_(float("nan")), edges=1)


# --- random circuits


@pytest.mark.parametrize("kind", ["edges", "heads"])
@pytest.mark.parametrize("graph", [PLAIN, SMALL], ids=["plain", "grouped"])
def test_random_circuits_keep_size_and_layer_profile(graph: Graph, kind: str) -> None:
    mask = (torch.rand(graph.allowed.shape) < 0.3) & graph.allowed
    cells = graph.layer_cells
    profile = torch.bincount(cells[mask], minlength=100)
    drawn = list(random_circuits(graph, mask, 20, kind=kind, seed=1))
    for draw in drawn:
        assert not bool((draw & ~graph.allowed).any())
        assert torch.equal(torch.bincount(cells[draw], minlength=100), profile)
    # with two heads in each of two layers there are only four ways to rename them
    assert len({tuple(draw.flatten().tolist()) for draw in drawn}) >= (4 if kind == "heads" and graph is PLAIN else 10)
    again = list(random_circuits(graph, mask, 20, kind=kind, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_renaming_heads_keeps_a_circuit_connected() -> None:
    mask = prune(SMALL, (torch.rand(SMALL.allowed.shape) < 0.3) & SMALL.allowed)
    for draw in random_circuits(SMALL, mask, 10, kind="heads"):
        assert torch.equal(prune(SMALL, draw), draw)


def test_drawing_edges_is_uniform() -> None:
    mask = torch.zeros_like(PLAIN.allowed)
    mask[PLAIN.edge("a0.h0->a1.h0<q>")] = True
    # 2 heads and an MLP of layer 0, into 6 attention readers and an MLP of layer 1
    counts = sum(draw.double() for draw in random_circuits(PLAIN, mask, 2100, seed=3))
    drawn = counts[counts > 0]
    assert len(drawn) == 21
    assert drawn.min() > 60
    assert drawn.max() < 145


def test_p_value_counts_the_observed_one() -> None:
    assert p_value(0.9, [0.1, 0.2, 0.9, 0.95]) == pytest.approx(3 / 5)
    assert p_value(1.0, [0.0] * 99) == pytest.approx(0.01)


# --- MIB: areas and files


def test_areas_by_hand() -> None:
    assert mib.areas([1.0] * 10) == (pytest.approx(0.999), pytest.approx(0.0))
    assert mib.areas([0.0] * 10) == (pytest.approx(0.0), pytest.approx(0.999))
    # 0 at .1, 2 at .5, 1 at 1: .4*(0+2)/2 + .5*(2+1)/2 ; .4*(1+1)/2 + .5*(1+0)/2
    assert mib.areas([0.0, 2.0, 1.0], [0.1, 0.5, 1.0]) == (pytest.approx(1.15), pytest.approx(0.65))
    with pytest.raises(MethodError):
        mib.areas([1.0, 1.0], [0.5, 0.1])
    with pytest.raises(MethodError):
        mib.areas([1.0])


def test_a_published_circuit_is_read_and_chosen_again(shared_data: Path) -> None:
    circuit = Circuit.from_json(shared_data / "mib" / "gpt2_ioi-eap-ig_circuit.json")
    assert (circuit.graph.n_edges, circuit.n_edges) == (32491, 756)
    assert circuit.scores is not None
    # its authors took the 800 edges of largest |score| and pruned; so must we, edge for edge
    assert torch.equal(select(circuit.graph, circuit.scores, edges=800), circuit.mask)
    published = json.loads((shared_data / "mib" / "gpt2_ioi-eap-ig_circuit.json").read_text())
    written = json.loads(circuit.to_json())
    assert written["cfg"] == published["cfg"]
    assert written["edges"] == published["edges"]
    assert {n for n, v in written["nodes"].items() if v["in_graph"]} == {
        n for n, v in published["nodes"].items() if v["in_graph"]
    }


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("graph", [PLAIN, SMALL], ids=["plain", "grouped"])
def test_json_round_trip(graph: Graph, per_head: bool, tmp_path: Path) -> None:
    scores = torch.randn(graph.allowed.shape, dtype=torch.float64).masked_fill(~graph.allowed, 0)
    circuit = Circuit.build(graph, select(graph, scores, edges=30), scores)
    circuit.to_json(tmp_path / "c.json", per_head=per_head)
    back = Circuit.from_json(tmp_path / "c.json")
    assert back.graph == graph
    assert torch.equal(back.mask, circuit.mask)
    assert back.scores is not None
    torch.testing.assert_close(back.scores, scores, rtol=0, atol=1e-15)
    names = set(json.loads((tmp_path / "c.json").read_text())["edges"])
    assert any(".g" in name for name in names) is (graph is SMALL and not per_head)


CFG: dict[str, Any] = {"n_layers": 1, "n_heads": 1}


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"cfg": CFG}),
        json.dumps({"cfg": {"n_layers": "x", "n_heads": 1}, "edges": {}}),
        json.dumps({"cfg": CFG, "edges": {"input->m9": {"score": 1, "in_graph": True}}}),
        json.dumps({"cfg": CFG, "edges": {"input->m0": {"score": 1}}}),
        json.dumps({"cfg": CFG, "edges": {"input->m0": 3}}),
        '{"cfg": {"n_layers": 1, "n_heads": 1}, "edges": {"input->m0": {"score": NaN, "in_graph": true}}}',
    ],
)
def test_a_file_that_is_no_circuit_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(StoreError):
        Circuit.from_json(tmp_path / "c.json")


# --- the circuit itself


def test_save_and_load(tmp_path: Path) -> None:
    scores = torch.randn(SMALL.allowed.shape, dtype=torch.float64)
    circuit = Circuit.build(SMALL, select(SMALL, scores, edges=40), scores, method="eap")
    circuit.save(tmp_path / "c")
    back = Circuit.load(tmp_path / "c", check=True)
    assert back.graph == SMALL
    assert torch.equal(back.mask, circuit.mask)
    assert back.tables["edges"].equals(circuit.tables["edges"])
    assert back.resized(edges=10).n_edges <= 10
    with pytest.raises(MethodError, match="bind"):
        _ = back.model


def test_nodes_and_complement() -> None:
    full = Circuit.from_nodes(SMALL, SMALL.nodes)
    assert full.n_edges == SMALL.n_edges
    assert full.complement().n_edges == 0
    small = Circuit.from_nodes(SMALL, ["input", "a0.h1", "a1.h3"])
    assert small.heads == [(0, 1), (1, 3)]
    assert small.n_edges + small.complement().n_edges == SMALL.n_edges
    # input into each head's q, k, v; a0.h1 into a1.h3's q, k, v; all three into logits
    assert small.n_edges == 3 + 3 + 3 + 3
    less = small.without("a0.h1")
    assert {s for s, _ in SMALL.edge_names(less.mask)} == {"input", "a1.h3"}
    assert not any("a0" in r for _, r in SMALL.edge_names(less.mask))
    with pytest.raises(MethodError, match="edges that its graph has not"):
        Circuit.build(SMALL, ~SMALL.allowed)
    with pytest.raises(MethodError, match="no scores"):
        small.resized(edges=3)


def test_without_a_head_leaves_shared_keys_that_others_read() -> None:
    circuit = Circuit.from_edges(SMALL, ["input->a0.h0<q>", "input->a0.g0<k>", "a0.h0->logits", "a0.h1->logits"])
    names = SMALL.edge_names(circuit.without("a0.h0").mask)
    assert names == [("input", "a0.g0<k>"), ("a0.h1", "logits")]


def test_every_layer_pair_has_its_own_cell() -> None:
    cells = {}
    for (s, source), (r, reader) in itertools.product(enumerate(SMALL.sources), enumerate(SMALL.readers)):
        if SMALL.allowed[s, r]:
            pair = SMALL.layer_of(source), SMALL.layer_of(reader)
            assert cells.setdefault(int(SMALL.layer_cells[s, r]), pair) == pair
    assert len(cells) == len(set(cells.values()))
