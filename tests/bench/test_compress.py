"""Compression: a narrower model with the same tasks, as faithful as it says, the same from the same seed."""

from pathlib import Path

import pytest
import torch

import headwater as hw
from headwater.bench import truth
from headwater.bench.compress import fold, gains
from headwater.bench.interchange import interchange
from headwater.bench.rasp import RaspError
from headwater.core.errors import MethodError


def test_a_projection_that_loses_nothing_changes_nothing() -> None:
    """Directions turned by an orthogonal W: the same logits from other weights."""
    compiled = truth.compile("sort_unique")
    width = compiled.hf.config.hidden_size
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    ids = torch.tensor([compiled.ids([3, 1, 2])])
    turned = torch.func.functional_call(compiled.hf, fold(compiled.hf, turn), (ids,)).logits
    torch.testing.assert_close(turned, compiled.hf(ids).logits, atol=1e-2, rtol=1e-3)


def test_gains_say_who_is_still_read() -> None:
    mechanism = truth.compile("histogram").mechanism
    rows = {row["variable"]: row for row in mechanism.tables["variables"].iter_rows(named=True)}
    found = gains(mechanism)
    assert found.shape == (3, mechanism.graph.d_model)
    tokens, share, answer = rows["tokens"]["first"], rows["histogram_share"]["first"], rows["histogram"]["first"]
    assert found[:, tokens].tolist() == [1.0, 0.0, 0.0]  # attention reads the tokens, nobody after it
    assert found[:, share].tolist() == [0.0, pytest.approx(56.0), 0.0]  # 1/7 - 1/8 = 1/56
    assert found[:, answer].tolist() == [0.0, 0.0, 1.0]


def test_a_narrower_model_says_the_same(tmp_path: Path) -> None:
    compiled = truth.compile("histogram")
    found = truth.compress(compiled, d_model=12, steps=40)
    narrow = found.compiled
    assert narrow.hf.config.hidden_size == 12 < compiled.hf.config.hidden_size
    assert found.accuracy > 0.95 and found.facts["accuracy_wide"] == 1.0
    inputs = ["abca", "dddd", "abcd"]
    said, meant = narrow.outputs(inputs), [narrow.interpret(one) for one in inputs]
    assert sum(x == y for a, b in zip(said, meant, strict=True) for x, y in zip(a, b, strict=True)) >= 11
    assert found.tables["curve"]["loss"].min() <= found.tables["curve"]["loss"][0]
    found.save(tmp_path / "report")
    again = hw.load_result(tmp_path / "report")
    assert again.content_hash == found.content_hash
    with pytest.raises(RaspError, match="holds no model"):
        again.compiled  # type: ignore[attr-defined]  # noqa: B018


def test_learning_beats_where_it_begins_and_is_reproducible() -> None:
    compiled = truth.compile("histogram")
    options = {"d_model": 9, "seed": 3}
    begin = truth.compress(compiled, steps=1, lr=1e-12, **options)
    one, two = (truth.compress(compiled, steps=60, **options) for _ in range(2))
    assert torch.equal(one.tensors["projection"], two.tensors["projection"])
    assert one.content_hash == two.content_hash
    assert one.tables["curve"]["loss"].min() < begin.tables["curve"]["loss"].min()


def test_the_circuit_stays_the_truth_in_superposition() -> None:
    """Heads and neurons without a task have a direction of their own, so they still reach nothing."""
    found = truth.compress("histogram", d_model=13, steps=1, lr=1e-12)
    narrow = found.compiled
    assert found.accuracy == 1.0
    result = interchange(narrow.model, narrow.mechanism, truth.behavior(narrow, 16))
    nodes = {row["node"]: row for row in result.tables["nodes"].iter_rows(named=True)}
    spare = (
        narrow.mechanism.tables["nodes"].filter(narrow.mechanism.tables["nodes"]["role"] == "spare")["node"].to_list()
    )
    assert spare and all(nodes[node]["effect"] == 0.0 for node in spare)
    assert result.facts["needed"] == 1.0
    directions = narrow.mechanism.directions("histogram")
    assert directions.shape == (8, 13)
    assert float((directions @ directions.T - torch.eye(8)).abs().max()) > 0.01  # they share


def test_what_does_not_fit_is_refused() -> None:
    compiled = truth.compile("histogram")
    with pytest.raises(RaspError, match="not be narrower"):
        truth.compress(compiled, d_model=99)
    with pytest.raises(MethodError, match="d_model"):
        truth.compress(compiled)
    with pytest.raises(MethodError, match="step"):
        truth.compress(compiled, d_model=8, stepps=3)
    with pytest.raises(RaspError, match="does not fit"):
        truth.compress(compiled, d_model=8, steps=0)
