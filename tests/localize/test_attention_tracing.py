"""Traced steps weigh what they carry, follow the tree's rules, and are knocked out as they say."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import headwater as hw
from headwater.core.errors import MethodError
from headwater.core.interventions import add, replace
from headwater.localize.engine.passes import Engine, Scored
from headwater.localize.engine.wiring import wiring_of
from headwater.localize.search.attention_tracing import TracingConfig, _Traced, attention_tracing, contributions, sizes
from headwater.localize.search.moves import captured, moves_of
from headwater.localize.search.roles import token_roles
from localize_families import make, pairs

KINDS = ("v", "pattern", "z", "attn_out")


@pytest.fixture(scope="module")
def induction() -> Any:
    return hw.behavior("induction", n=12, seed=0)


def traced(name: str, **options: Any) -> _Traced:
    return _Traced(Engine(make(name)), Scored.named("logit_diff"), TracingConfig(**options), pairs(2, 5, 2), 1.0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "olmo2"])
def test_a_weight_is_the_metrics_slope_along_the_term(name: str) -> None:
    """The metric's change as a term is added a little more, measured by adding it (some softmax in float32)."""
    model, one = make(name), traced(name)
    ids = one.group.clean
    run = captured(model, ids, KINDS, logits="last")
    for layer, info in enumerate(wiring_of(model).layers):
        moves, head = moves_of(info, run, torch.float64), layer + 1
        term = moves.term(head, slice(None))
        for query, source in ((4, 1), (4, 3), (2, 0)):
            values = []
            for step in (1e-3, -1e-3):
                more = torch.zeros_like(run[f"attn_out.{layer}"])
                more[:, query] = step * term[:, query, source]
                logits = model.run(ids, logits="last", interventions=[add(f"attn_out.{layer}", more)]).logits
                values.append(one._score(logits, slice(None)))
            slope = (values[0] - values[1]) / 2e-3
            torch.testing.assert_close(one.weights[:, layer, head, query, source], slope, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_weights_add_up(name: str) -> None:
    model, ids = make(name), pairs(2, 5, 2).clean
    run = captured(model, ids, KINDS, logits="none")
    gradient = torch.randn(2, 5, 32, dtype=torch.float64)
    for layer, info in enumerate(wiring_of(model).layers):
        moves = moves_of(info, run, torch.float64)
        whole = (run[f"attn_out.{layer}"] * gradient).sum(dim=-1)
        torch.testing.assert_close(contributions(moves, gradient).sum(dim=(1, 3)), whole, rtol=0, atol=1e-5)
        shares = sizes(moves)
        assert not bool(shares.triu(1).any())
        torch.testing.assert_close(shares.sum(dim=(1, 3)), torch.ones_like(whole))


@pytest.mark.parametrize("knockout", ["mask", "zero"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_knocking_out_is_what_it_says(name: str, knockout: Any) -> None:
    """Beside a run whose pattern is rewritten by hand: without the token and shared out again, or just without it."""
    one = traced(name, knockout=knockout)
    model, ids = one.engine.model, one.group.clean
    jobs = [(0, (0, 1, 4, 2)), (1, (0, 1, 4, 0)), (1, (0, 3, 3, 2)), (0, (1, 0, 4, 3))]
    found = one._without(jobs)
    for (row, (layer, head, query, source)), value in zip(jobs, found, strict=True):
        pattern = one.patterns[row : row + 1, layer, head].clone()
        pattern[:, query, source] = 0
        if knockout == "mask":
            pattern[:, query] /= pattern[:, query].sum(dim=-1, keepdim=True)
        edit = replace(f"pattern.{layer}.h{head}", pattern)
        logits = model.run(ids[row : row + 1], logits="last", interventions=[edit]).logits
        assert value == pytest.approx(float(one._score(logits, [row])), rel=1e-5, abs=1e-6)
        assert value != pytest.approx(float(one.clean[row]), abs=1e-6)


def test_a_tree_follows_the_heaviest_steps_backwards() -> None:
    one = traced("gpt2", branches=2, depth=2, least=0.0)
    one.weights = torch.zeros_like(one.weights)
    one.weights[0, 1, 2, 4, 3] = 0.5  # layer, head, query, source
    one.weights[0, 1, 0, 4, 1] = -0.8
    one.weights[0, 0, 1, 4, 2] = 0.3  # a third branch
    one.weights[0, 0, 3, 1, 0] = 0.2  # below the second
    one.weights[0, 1, 3, 3, 0] = 0.9  # not below layer 1
    one.weights[0, 1, 1, 4, 4] = 9.0  # a token reading itself is no step
    one.weights[1, 1, 1, 2, 0] = 1.0  # not the answer's token
    one.grow(1.0)
    steps = [(s.parent, s.depth, s.layer, s.head, s.query, s.source, s.weight) for s in one.trees[0]]
    assert steps == [(-1, 0, 1, 0, 4, 1, -0.8), (-1, 0, 1, 2, 4, 3, 0.5), (0, 1, 0, 3, 1, 0, 0.2)]
    assert one.trees[1] == []
    one.trees.clear()
    one.config = TracingConfig(branches=3, depth=1, least=0.4)
    one.grow(1.0)
    assert [s.weight for s in one.trees[0]] == [-0.8, 0.5]


def test_roles_name_tokens_by_the_nearest_named_one() -> None:
    group = pairs(2, 9, 2)
    group.positions.update(S2=torch.tensor([4, 3]), also=torch.tensor([4, 6]))
    assert token_roles(group) == [
        ["start", "other", "S2-2", "S2-1", "S2", "S2+1", "S2+2", "END-1", "END"],
        ["start", "S2-2", "S2-1", "S2", "S2+1", "also-1", "also", "also+1", "END"],
    ]


def test_as_users_call_it(tiny_model: Any, induction: Any, tmp_path: Path) -> None:
    result: Any = hw.localize.methods.get("attention_tracing")(tiny_model, induction, branches=2)
    trees, steps = result.tables["trees"], result.tables["steps"]
    n = result.facts["n"]
    assert n == induction.train.n and trees["row"].n_unique() <= n
    places = trees.select("row", "layer", "head", "query", "source").unique().height
    assert 2 * n + places <= result.facts["passes"]["forward"] <= 2 * n + 2 * places
    assert result.facts["passes"]["backward"] == n
    assert trees["effect"].null_count() == 0 and (trees["query"] > trees["source"]).all()
    below = trees.filter(pl.col("depth") == 1)
    up = {(r["row"], r["step"]): r for r in trees.to_dicts()}
    for step in below.to_dicts():
        above = up[step["row"], step["parent"]]
        assert step["query"] == above["source"] and step["layer"] < above["layer"]
    assert steps["n"].max() <= n and steps["share"].max() <= 1
    row = int(trees["row"][0])
    text = result.text(row)
    assert len(text.splitlines()) == 1 + trees.filter(pl.col("row") == row).height
    assert "(END)" in text.splitlines()[0] and "without it" in text
    with pytest.raises(MethodError, match="not traced"):
        result.text(-1)
    result.save(tmp_path / "r")
    back: Any = hw.load_result(tmp_path / "r", check=True)
    assert back.content_hash == attention_tracing(tiny_model, induction, branches=2).content_hash
    assert back.chart().to_dict()


def test_norms_need_no_gradient(tiny_model: Any, induction: Any) -> None:
    result: Any = attention_tracing(tiny_model, induction[:8], weight="norm", metric="kl", depth=1, least=0.0)
    assert result.facts["passes"]["backward"] == 0
    assert bool((result.tables["trees"]["weight"] > 0).all()) and result.tables["trees"]["depth"].max() == 0
    with pytest.raises(MethodError, match="gradient of KL is zero"):
        attention_tracing(tiny_model, induction, metric="kl")
    with pytest.raises(MethodError, match="weight: Input should be"):
        attention_tracing(tiny_model, induction, weight="size")
    with pytest.raises(MethodError, match="at least one branch"):
        TracingConfig(depth=0)


@pytest.mark.slow
@pytest.mark.real_model
def test_it_finds_induction_in_a_real_model(smollm2: Any) -> None:
    """Induction heads read the word that came next, and heads there read the word before it; both matter."""
    steps = attention_tracing(smollm2, hw.behavior("induction", n=16, seed=0)).tables["steps"]
    copying = steps.filter(pl.col("query_role") == "END", pl.col("source_role") == "source").sort("share").tail(1)
    assert copying["share"].item() >= 0.5
    assert copying["effect"].item() > 0.05 > abs(copying["control"].item())
    before = steps.filter(pl.col("query_role") == "source", pl.col("source_role") == "first")
    assert before["effect"].max() > 0.05
