"""Scores against known mechanisms: the measures by their definitions, every kind of result read, cells that survive."""

import json
import math
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import headwater as hw
from headwater.bench import score, truth
from headwater.bench.scoring import baselines, measures, run
from headwater.bench.scoring.readings import Reading, edge_rows, joined, node_rows, read
from headwater.bench.scoring.run import compare
from headwater.bench.scoring.subjects import Source, Subject
from headwater.bench.scoring.table import CELLS, FAILED, summed_up
from headwater.core.errors import MethodError, StoreError
from headwater.core.results import Result, load_result, register_result
from headwater.localize.catalog import methods
from headwater.localize.engine.passes import for_discovery

scored = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.9, 2.0]), st.booleans()), min_size=2, max_size=40)


@pytest.fixture(scope="module")
def subject() -> Subject:
    made = Source(name="histogram", origin="compiled").make(16, 0)
    assert isinstance(made, Subject)
    return made


# --- measures


@settings(deadline=None, max_examples=60)
@given(scored)
def test_measures_are_those_of_scikit_learn(rows: list[tuple[float, bool]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="the measures are compared with scikit-learn's")
    scores, true = [row[0] for row in rows], [row[1] for row in rows]
    if any(true):
        assert measures.average_precision(scores, true) == pytest.approx(
            sklearn.average_precision_score(true, scores), abs=1e-12
        )
    else:
        assert math.isnan(measures.average_precision(scores, true))
    if any(true) and not all(true):
        assert measures.auroc(scores, true) == pytest.approx(sklearn.roc_auc_score(true, scores), abs=1e-12)
    else:
        assert math.isnan(measures.auroc(scores, true))


@settings(deadline=None, max_examples=30)
@given(scored)
def test_precision_at_the_true_size_is_the_mean_over_orders_of_ties(rows: list[tuple[float, bool]]) -> None:
    scores, true = [row[0] for row in rows], [row[1] for row in rows]
    k = sum(true)
    found = measures.precision_at_size(scores, true)
    if not k:
        assert math.isnan(found)
        return
    rng, total = random.Random(0), 0.0
    for _ in range(400):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], rng.random()))
        total += sum(true[i] for i in order[:k]) / k
    assert found == pytest.approx(total / 400, abs=0.12)


def test_measures_by_hand() -> None:
    scores, true = [3.0, 2.0, 2.0, 1.0], [True, True, False, False]
    assert measures.auroc(scores, true) == 3.5 / 4
    assert measures.average_precision(scores, true) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert measures.precision_at_size(scores, true) == 0.75
    found, real = torch.tensor([True, True, True, False]), torch.tensor([True, False, False, True])
    assert measures.precision_recall_f1(found, real) == (1 / 3, 1 / 2, 2 / 5)
    nothing = torch.zeros(4, dtype=torch.bool)
    assert math.isnan(measures.precision_recall_f1(nothing, real)[0])
    assert measures.precision_recall_f1(nothing, real)[1:] == (0.0, 0.0)


def test_spearman_is_scipys() -> None:
    from scipy.stats import spearmanr

    rng = random.Random(1)
    a = [rng.choice([0.0, 1.0, 2.0]) for _ in range(30)]
    b = [x + rng.random() for x in a]
    assert measures.spearman(a, b) == pytest.approx(spearmanr(a, b)[0])
    assert math.isnan(measures.spearman([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]))


def test_intervals_draw_whole_programs() -> None:
    nan = math.nan
    mean, low, high, n = measures.clustered({"a": [0.0, 0.2, nan], "b": [1.0], "c": [nan], "d": []})
    assert (mean, n) == (pytest.approx(0.55), 2)
    assert (low, high) == (pytest.approx(0.1), pytest.approx(1.0))  # both of one program is a likely draw
    mean, low, high, n = measures.clustered({"a": [0.4, 0.6]})
    assert (mean, n) == (0.5, 1) and math.isnan(low) and math.isnan(high)
    assert measures.clustered({})[3] == 0
    values = {str(i): [i / 40] for i in range(40)}
    _, low, high, _ = measures.clustered(values)
    assert high - low == pytest.approx(2 * 1.96 * 0.2886 / 40**0.5, rel=0.15)  # that of a mean of 40


# --- readings


def test_a_perfect_method_gets_one_everywhere(subject: Subject) -> None:
    mechanism = subject.mechanism
    live = set(mechanism.live_nodes)
    nodes = torch.tensor([float(name in live) for name in mechanism.graph.sources], dtype=torch.float64)
    mask = mechanism.tensors["mask"]
    edges = mask.double().masked_fill(~mechanism.graph.allowed, math.nan)
    exact = truth.interchange(subject.model, mechanism, for_discovery(subject.behavior))
    row = compare(Reading(nodes=nodes, edges=edges, own=mask), subject, exact)
    for key, value in row.items():
        if "spearman" not in key and key != "own_edges":
            assert value == 1.0, key
    assert row["edge_spearman"] > 0.9 and row["own_edges"] == int(mask.sum())
    wrong = compare(Reading(nodes=-nodes, edges=-edges), subject, exact)
    assert wrong["edge_auroc"] == 0.0 and wrong["node_auroc"] == 0.0 and wrong["edge_spearman"] < -0.9


def test_random_scores_are_right_half_of_the_time(subject: Subject) -> None:
    rows = [compare(baselines.random_scores(subject.model, subject.behavior, seed), subject) for seed in range(400)]
    table = pl.DataFrame(rows)
    share = subject.mechanism.tensors["mask"].sum() / subject.mechanism.graph.n_edges
    assert abs(float(table["node_auroc"].mean()) - 0.5) < 0.08  # type: ignore[arg-type]
    assert abs(float(table["edge_auroc"].mean()) - 0.5) < 0.04  # type: ignore[arg-type]
    assert abs(float(table["edge_precision"].mean()) - float(share)) < 0.05  # type: ignore[arg-type]


def test_every_method_is_read_or_says_why_not(subject: Subject) -> None:
    """So that no method is left out of the table silently, one that is added tomorrow included."""
    entries, unscored = run._entries(None)
    assert {entry.method for entry in entries} | set(unscored) == {*methods.names(), *baselines.BASELINES}
    assert all(unscored.values())
    quick = {"edge_pruning": 3, "node_pruning": 3, "optimal_ablation": 2, "head_codes": 3}
    graph = subject.mechanism.graph
    for entry in entries:
        extra = {"steps": quick[entry.method]} if entry.method in quick else {}
        reading, _ = run.Entry(**{**vars(entry), "options": entry.options | extra}).run(subject, 0)
        assert reading.nodes.shape == (len(graph.sources),)
        assert reading.scope(graph) in ("nodes, edges", "heads, edges", "nodes", "heads")
        if reading.edges is not None:
            assert not bool(torch.isnan(reading.edges[graph.allowed]).any())
            assert bool(torch.isnan(reading.edges[~graph.allowed]).all())
        row = compare(reading, subject)
        assert row["node_auroc"] is None or 0 <= row["node_auroc"] <= 1


def test_scores_count_by_their_size_unless_the_method_says_otherwise(subject: Subject) -> None:
    graph = subject.mechanism.graph
    scores = torch.zeros(graph.allowed.shape, dtype=torch.float64)
    scores[1, -1], scores[2, -1] = -3.0, 1.0
    plain, signed = Result(tensors={"scores": scores}), Result(tensors={"scores": scores}, facts={"rank": "signed"})
    assert read(plain, graph).nodes.tolist() == [0.0, 3.0, 1.0, 0.0]
    assert read(signed, graph).nodes.tolist() == [0.0, 0.0, 1.0, 0.0]  # a node counts as its strongest edge
    by_nodes = pl.DataFrame({"node": ["a0.h1", "a0.h0", "a0.h0", "a0.h0<q>"], "score": [None, 1.0, -2.0, 9.0]})
    found = read(Result(tables={"nodes": by_nodes}), graph).nodes
    assert found[1] == 2.0 and bool(torch.isnan(found[[0, 2, 3]]).all())
    assert node_rows(read(Result(tables={"nodes": by_nodes}), graph), subject.mechanism)["node"].to_list() == ["a0.h0"]
    with pytest.raises(MethodError, match="no scores of nodes"):
        read(Result(), graph)
    with pytest.raises(MethodError, match="another graph"):
        read(Result(tensors={"scores": torch.zeros(2, 2)}), graph)


def test_edges_into_a_head_count_once_where_no_more_is_known(subject: Subject) -> None:
    mechanism = subject.mechanism
    graph = mechanism.graph
    scores = torch.arange(graph.allowed.numel(), dtype=torch.float64).view(graph.allowed.shape)
    scores = scores.masked_fill(~graph.allowed, math.nan)
    parts = edge_rows(scores, mechanism, granularity="part")
    heads = edge_rows(scores, mechanism, granularity="head")
    assert parts.height == graph.n_edges and parts["true"].sum() == int(mechanism.tensors["mask"].sum())
    assert heads.height == len({(s, t.split("<")[0]) for s, t in parts.select("source", "target").iter_rows()})
    into = parts.filter(pl.col("source") == "input", pl.col("target").str.starts_with("a0.h1<"))
    row = heads.filter(source="input", target="a0.h1").row(0, named=True)
    assert row["score"] == into["score"].max() and row["true"] == into["true"].any()
    assert all(a >= b for a, b in pairwise(heads["score"].to_list()))
    coarse = type(mechanism)(tables=mechanism.tables, tensors=mechanism.tensors, facts=mechanism.facts | {
        "granularity": "head"
    })  # fmt: skip
    assert int(joined(graph.allowed, coarse).sum()) == heads.height
    assert int(joined(mechanism.tensors["mask"], coarse).sum()) == heads["true"].sum()
    assert int(joined(graph.allowed, mechanism).sum()) == graph.n_edges


def test_sizes_are_those_of_weights_and_of_writes(subject: Subject) -> None:
    hf, graph = subject.model.hf, subject.mechanism.graph
    norms = baselines.weight_norm(subject.model, subject.behavior, 0).nodes
    out = hf.layers[0].attn.o_proj.weight.view(graph.d_model, graph.n_heads, -1)
    assert norms[1].item() == pytest.approx(out[:, 0].norm().item(), rel=1e-5)
    assert norms[3].item() == pytest.approx(hf.layers[0].mlp.down_proj.weight.norm().item(), rel=1e-5)
    moved = baselines.activation_difference(subject.model, subject.behavior, 0)
    pairs, total = for_discovery(subject.behavior), 0.0
    for row in pairs.frame.to_dicts():
        a, b = (
            subject.model.run(row[side], capture=["mlp_out.0"])["mlp_out.0"] for side in ("prompt", "counterfactual")
        )
        total += float((a - b).norm())
    assert moved.nodes[3].item() == pytest.approx(total / pairs.n, rel=1e-4)
    assert moved.edges is not None
    at = graph.edge("input->a0.h1<q>")
    assert moved.edges[at].item() == pytest.approx(float(moved.nodes[0] * moved.nodes[2]))


# --- the table


@register_result
class Nothing(Result):
    kind = "nothing_scored"


@pytest.fixture
def outside() -> Iterator[None]:
    """Methods that an outside package might bring: one that is right, one that fails, one that scores nothing."""

    def knowing(model: Any, behavior: Any, **options: Any) -> Result:
        mask = truth.compile(behavior.about["program"]).mechanism.tensors["mask"]
        return Result(tensors={"scores": mask.double()}, facts={"n": 8, "passes": {"forward": 16, "backward": 8}})

    def failing(model: Any, behavior: Any, **options: Any) -> Result:
        if behavior.about["program"] == "first":
            raise ZeroDivisionError("nothing to divide by")
        return knowing(model, behavior)

    added = {"knowing": knowing, "failing": failing, "silent": lambda model, behavior, **options: Nothing()}
    for name, method in added.items():
        methods.register(name)(method)
    yield
    for name in added:
        del methods._known[name]


def test_methods_from_outside_failures_and_silence_all_show(outside: None) -> None:
    assert {"knowing", "failing", "silent"} <= set(run.names())
    found = score(
        ["knowing", "failing", "silent", "causal_trace"], ["first", "histogram", "length"], seeds=(0, 1), pairs=8
    )
    assert found.value("knowing", "edge_auroc") == (1.0, 1.0, 1.0)
    board = {row["method"]: row for row in found.to_frame().to_dicts()}
    assert board["knowing"]["passes"] == 3.0 and board["knowing"]["models"] == 2 and board["knowing"]["failed"] == 0
    assert found.to_frame()["method"][0] == "knowing"
    assert (board["failing"]["failed"], board["failing"]["models"]) == (2, 1)
    errors = found.tables["failed"]["error"].to_list()
    assert errors == ["ZeroDivisionError: nothing to divide by"] * 2
    assert set(found.tables["unscored"]["method"]) == {"silent", "causal_trace"}
    assert "silent" not in board and {"random", "weight_norm", "activation_difference"} <= set(board)
    models = found.tables["models"]
    assert "no pairs" in models.filter(model="length")["why_not"][0]
    assert found.tables["cells"].filter(model="length").height == 0
    histogram = models.filter(model="histogram").row(0, named=True)
    assert (histogram["edges"], histogram["true_edges"], histogram["outside"]) == (13, 4, 0.0)
    with pytest.raises(MethodError, match="no such score"):
        found.value("silent")
    assert found.chart().to_dict()


def test_a_killed_run_goes_on_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"methods": ["eap", "patch"], "models": ["first", "histogram"], "seeds": (0, 1), "pairs": 8}
    whole = score(**asked)
    assert whole.tables["failed"].height == 0
    ran: list[str] = []
    real = run.Entry.run

    def counting(self: run.Entry, subject: Subject, seed: int) -> Any:
        ran.append(self.label)
        if len(ran) == 7:
            raise KeyboardInterrupt
        return real(self, subject, seed)

    monkeypatch.setattr(run.Entry, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        score(**asked, out=tmp_path)
    path = tmp_path / "cells.jsonl"
    assert len(path.read_text().splitlines()) == 6 + 2  # six cells, two models
    with path.open("ab") as file:
        file.write(b'{"key": "half a li')  # killed while writing
    again = score(**asked, out=tmp_path)
    assert len(ran) == 7 + 20 - 6
    for name in whole.tables:
        seconds = [column for column in whole.tables[name].columns if column == "seconds"]
        assert again.tables[name].drop(seconds).equals(whole.tables[name].drop(seconds)), name
    score(**asked, out=tmp_path)
    assert len(ran) == 7 + 20 - 6  # nothing is run twice
    stored = load_result(tmp_path / "result")
    assert stored.content_hash == again.content_hash
    assert json.loads((tmp_path / "leaderboard.json").read_text())[0]["method"] == again.to_frame()["method"][0]
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    with pytest.raises(StoreError, match="stored cell"):
        score(**asked, out=tmp_path)


def test_methods_on_two_small_programs() -> None:
    """What the leaderboard is for: searching by real runs finds these circuits, random scores do not."""
    found = score(["eap_ig", "acdc", "patch"], ["reverse", "fraction_of_x"], seeds=(0, 1), pairs=32)
    assert found.value("acdc", "edge_auroc")[0] == 1.0 and found.value("acdc", "own_f1")[0] == 1.0
    assert found.value("patch", "node_auroc")[0] == 1.0 and found.value("patch", "node_spearman")[0] > 0.9
    assert found.value("acdc", "edge_spearman")[0] > 0.9
    assert 0.5 < found.value("eap_ig", "edge_auroc")[0] <= 1.0
    assert found.value("random", "edge_precision")[0] < 0.4
    assert found.tables["cells"].filter(method="acdc")["passes"].min() > 10  # type: ignore[operator]


def test_one_method_may_stand_in_the_table_twice() -> None:
    asked = {"coarse": {"method": "eap_ig", "steps": 1}, "fine": {"method": "eap_ig", "steps": 8}}
    board = score(asked, ["histogram"], seeds=(3,), pairs=8).to_frame()
    passes = dict(board.select("method", "passes").iter_rows())
    assert (passes["coarse"], passes["fine"]) == (3.0, 17.0)
    assert dict(board.select("method", "options").iter_rows())["fine"] == "steps=8"


def test_methods_that_learn_run_with_fewer_seeds() -> None:
    asked = {"edge_pruning": {"steps": 2}, "eap": {}}
    cells = score(asked, ["histogram"], seeds=(4, 5), pairs=8).tables["cells"]
    assert cells.filter(method="edge_pruning")["seed"].to_list() == [4]
    assert cells.filter(method="eap")["seed"].to_list() == [4, 5]
    more = score(asked, ["histogram"], seeds=(4, 5), costly_seeds=2, pairs=8).tables["cells"]
    assert more.filter(method="edge_pruning")["seed"].to_list() == [4, 5]


@pytest.mark.parametrize("name", ["pair_difference", "digit_sum_mod_3"])
def test_programs_that_read_no_positions_are_seen_from_inside(name: str) -> None:
    """Their stream was empty on words that no input has, and so what was probed at load with such words."""
    compiled = truth.compile(name)
    assert compiled.model.anatomy.refused == {}
    words = compiled.hf.embed_tokens.weight
    assert bool((words != 0).any(dim=1).all())


def test_a_trained_model_is_read_from_its_own_words(subject: Subject, tmp_path: Path) -> None:
    """An object with model, mechanism and behavior stands beside programs; a folder without a model is refused."""

    class Made:
        name = "mine"
        model, mechanism = subject.model, subject.mechanism

        def behavior(self, n: int, *, seed: int) -> hw.behavior.Behavior:  # type: ignore[name-defined]
            return truth.behavior("histogram", n, seed=seed)

    found = score(["patch"], [Made(), "first"], seeds=(0,), pairs=8)
    assert found.tables["models"]["origin"].to_list() == ["given", "compiled"]
    for wrong, words in ((tmp_path, "bench train"), ("histogran", "histogram"), (3, "mechanism is known")):
        with pytest.raises(MethodError, match=words):
            score(["patch"], [wrong], seeds=(0,), pairs=8)
    with pytest.raises(MethodError, match="name of its own"):
        score(["patch"], ["first", "first"], seeds=(0,), pairs=8)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MethodError, match="eap_ig"):
        score(["eap_igg"], ["first"])
    for options in ({"seeds": ()}, {"seeds": (1, 1)}, {"pairs": 2}, {"costly_seeds": 0}):
        with pytest.raises(MethodError, match="pairs and seeds"):
            score(["eap"], ["first"], **options)  # type: ignore[arg-type]


def test_the_best_stand_first_and_failures_are_in_no_mean() -> None:
    def cell(method: str, model: str, seed: int, edge: float | None, node: float | None) -> dict[str, Any]:
        return dict.fromkeys(CELLS) | {
            "method": method, "model": model, "seed": seed, "scope": "nodes, edges" if edge is not None else "nodes",
            "edge_auroc": edge, "node_auroc": node,
        }  # fmt: skip

    cells = [cell("a", "x", 0, 0.6, 0.9), cell("a", "x", 1, 0.8, 0.9), cell("a", "y", 0, 0.9, 0.5)]
    cells += [cell("b", "x", 0, None, 1.0), cell("c", "x", 0, 0.95, None)]
    failed = pl.DataFrame([{"method": "c", "model": "y", "seed": 0, "error": "no"}], schema=FAILED)
    order = [("b", "method", ""), ("a", "method", "steps=5"), ("c", "baseline", "")]
    board, scores = summed_up(pl.DataFrame(cells, schema=CELLS), failed, order)
    assert board["method"].to_list() == ["c", "a", "b"]
    assert board["failed"].to_list() == [1, 0, 0] and board["models"].to_list() == [1, 2, 1]
    assert board["edge_auroc"].to_list() == [0.95, pytest.approx(0.8), None]
    assert board["edge_auroc_lo"].to_list() == [None, pytest.approx(0.7), None]
    row = scores.filter(method="a", measure="edge_auroc").row(0, named=True)
    assert (row["models"], row["cells"]) == (2, 3)
    assert scores.filter(method="b", measure="edge_auroc").is_empty()


# --- the command line


def test_the_leaderboard_on_the_command_line(tmp_path: Path) -> None:
    from headwater.cli.app import app

    args = ["bench", "truth", "--methods", "eap,causal_trace", "--programs", "first,length", "--seeds", "1"]
    args += ["--pairs", "8", "--out", str(tmp_path / "t")]
    said = CliRunner().invoke(app, args)
    assert said.exit_code == 0, said.output
    for words in ("node AUROC", "random (baseline)", "Not scored: causal_trace", "Left out: length has no pairs"):
        assert words in said.output
    again = CliRunner().invoke(app, [*args, "--json"])
    board = json.loads(again.stdout)["leaderboard"]
    assert board == json.loads((tmp_path / "t" / "leaderboard.json").read_text())
    assert (tmp_path / "t" / "result" / "leaderboard.parquet").is_file()


def test_rates_on_the_command_line(tmp_path: Path) -> None:
    from headwater.cli.app import app

    args = ["bench", "rates", "--nulls", "0", "--programs", "first", "--pairs", "16", "--out", str(tmp_path / "r")]
    said = CliRunner().invoke(app, args)
    assert said.exit_code == 0, said.output
    assert "true mechanism" in said.output
    stored = json.loads((tmp_path / "r" / "rates.json").read_text())
    assert stored["facts"]["investigations"] == 1 and stored["rates"][0]["n"] > 0
    assert load_result(tmp_path / "r" / "result").kind == "claim_rates"
