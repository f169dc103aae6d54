"""Circuits on each other's behaviors, and groups of heads: against what the circuits themselves say, and by hand."""

import polars as pl
import pytest
import torch

import headwater as hw
from headwater.core.errors import MethodError
from headwater.localize.circuit import Circuit
from headwater.localize.comparing.heads import attention_to_places, mean_outputs, metric_values
from headwater.localize.comparing.reuse import group_tests, reuse
from headwater.localize.engine.wiring import graph_of


@pytest.fixture(scope="module")
def behaviors():
    return {"ioi": hw.behavior("ioi", n=12, seed=0), "induction": hw.behavior("induction", n=12, seed=0, period=4)}


def circuit(model, seed, density=0.4):
    graph = graph_of(model)
    drawn = torch.rand(graph.allowed.shape, generator=torch.Generator().manual_seed(seed)) < density
    return Circuit.build(graph, drawn & graph.allowed, model=model)


def test_the_matrix_holds_what_each_circuit_says_of_itself(tiny_model64, behaviors) -> None:
    circuits = {"ioi": circuit(tiny_model64, 1), "induction": circuit(tiny_model64, 2)}
    result = reuse(circuits, behaviors, draws=3)
    for name, one in circuits.items():
        for task, behavior in behaviors.items():
            assert result.faithfulness(name, task) == pytest.approx(one.faithfulness(behavior.test).value, rel=1e-9)
    table = result.tables["matrix"]
    own = table.filter(pl.col("circuit") == pl.col("behavior"))
    assert own["relative"].to_list() == pytest.approx([1.0, 1.0])
    assert table["p"].is_between(0.25 - 1e-9, 1.0).all()
    stand = (
        result.tables["stand_in"]
        .filter((pl.col("behavior") == "ioi") & (pl.col("which") == "shared"))
        .row(0, named=True)
    )
    both = Circuit.build(graph_of(tiny_model64), circuits["ioi"].mask & circuits["induction"].mask, model=tiny_model64)
    expected = both.faithfulness(behaviors["ioi"].test).value
    assert stand["faithfulness"] == pytest.approx(expected, rel=1e-9)
    assert stand["share"] == pytest.approx(expected / result.faithfulness("ioi", "ioi"), rel=1e-9)
    assert stand["edges"] == both.n_edges
    overlap = result.tables["overlap"]
    assert overlap.filter(pl.col("a") == pl.col("b"))["iou"].to_list() == [1.0, 1.0]
    heads = result.tables["heads"]
    assert heads["circuits"].max() == 2
    assert set(heads.filter(circuits=2).select("layer", "head").rows()) == set(circuits["ioi"].heads) & set(
        circuits["induction"].heads
    )


def test_under_another_ablation_the_empty_circuit_is_the_zero(tiny_model64, behaviors) -> None:
    one = circuit(tiny_model64, 1)
    result = reuse({"ioi": one}, {"ioi": behaviors["ioi"]}, draws=1, ablation="zero")
    expected = one.faithfulness(behaviors["ioi"].test, ablation="zero").value
    assert result.faithfulness("ioi", "ioi") == pytest.approx(expected, rel=1e-9)
    assert result.tables["matrix"]["relative"][0] == pytest.approx(1.0)


def test_the_whole_model_stands_in_for_anything(tiny_model64, behaviors) -> None:
    whole = Circuit.build(graph_of(tiny_model64), graph_of(tiny_model64).allowed, model=tiny_model64)
    result = reuse({"ioi": circuit(tiny_model64, 1), "whole": whole}, {"ioi": behaviors["ioi"]}, draws=0)
    assert result.faithfulness("whole", "ioi") == pytest.approx(1.0)
    assert result.tables["matrix"]["p"].null_count() == 2
    with pytest.raises(MethodError, match="no such cell"):
        result.faithfulness("whole", "nothing")


def test_a_group_is_tested_by_patching_and_by_attention(tiny_model64, behaviors) -> None:
    ioi = behaviors["ioi"]
    group = [(0, 1), (2, 3)]
    result = group_tests(tiny_model64, ioi, {"previous_token": group, "mine": [(1, 0)]}, draws=4)
    row = result.tables["groups"].row(0, named=True)
    train, test = ioi.train.bind(tiny_model64), ioi.test.bind(tiny_model64)
    means = mean_outputs(tiny_model64, train)
    clean = metric_values(tiny_model64, test)
    lost = clean - metric_values(tiny_model64, test, out=group, means=means)
    whole = clean - metric_values(tiny_model64, test, side="corrupt")
    assert row["effect"] == pytest.approx(float(lost.mean() / whole.mean()))
    place = attention_to_places(tiny_model64, test, ["previous_token"])["previous_token"].mean(dim=0)
    assert row["attention"] == pytest.approx(float((place[0, 1] + place[2, 3]) / 2))
    assert 0.2 - 1e-9 <= row["p"] <= 1 and row["heads"] == "a0.h1, a2.h3"
    assert result.tables["groups"]["attention"][1] is None


@pytest.mark.parametrize(
    ("groups", "roles", "says"),
    [
        ({"x": []}, {}, "no heads"),
        ({"x": [(9, 0)]}, {}, "has not"),
        ({"x": [(0, 0)]}, {"x": "nosuch"}, "unknown role"),
        ({}, {}, "nothing"),
    ],
)
def test_groups_that_make_no_sense_are_refused(tiny_model64, behaviors, groups, roles, says) -> None:
    with pytest.raises(MethodError, match=says):
        group_tests(tiny_model64, behaviors["ioi"], groups, roles=roles)


def test_circuits_of_different_graphs_are_refused(tiny_model64, behaviors) -> None:
    other = hw.localize.Graph(n_layers=1, n_heads=2, n_kv_heads=2)
    circuits = {"ioi": circuit(tiny_model64, 1), "other": Circuit.build(other, other.allowed)}
    with pytest.raises(MethodError, match="another graph"):
        reuse(circuits, behaviors, draws=0)
    with pytest.raises(MethodError, match="needs circuits"):
        reuse({}, behaviors)
