"""Metrics against their plain definitions, one row and one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.behavior.metrics import SHARES, STEPS, interval, metric, metrics_known
from headwater.core.errors import MethodError

V = 11


def plain(name: str, logits: list[float], answers: list[int], foils: list[int], reference: list[float]) -> float:
    """The metric of one row in plain Python."""
    total = sum(math.exp(x) for x in logits)
    best = max(logits[a] for a in answers)
    if name == "logit_diff":
        return sum(logits[a] for a in answers) / len(answers) - sum(logits[f] for f in foils) / len(foils)
    if name == "prob_diff":
        return (sum(math.exp(logits[a]) for a in answers) - sum(math.exp(logits[f]) for f in foils)) / total
    if name == "prob":
        return sum(math.exp(logits[a]) for a in answers) / total
    if name == "accuracy":
        others = [logits[f] for f in foils] or [x for i, x in enumerate(logits) if i not in answers]
        return float(all(best > other for other in others))
    if name == "rank":
        return float(sum(x > best for x in logits))
    total_reference = sum(math.exp(x) for x in reference)
    return sum(
        math.exp(r) / total_reference * ((r - math.log(total_reference)) - (x - math.log(total)))
        for r, x in zip(reference, logits, strict=True)
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], list[list[int]]]:
    n = draw(st.integers(1, 4))
    # few distinct values, so that ties happen
    values = st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 4.0])
    logits = torch.tensor([[draw(values) for _ in range(V)] for _ in range(n)], dtype=torch.float64)
    reference = torch.tensor([[draw(values) for _ in range(V)] for _ in range(n)], dtype=torch.float64)
    answers, foils = [], []
    for _ in range(n):
        ids = draw(st.permutations(range(V)))
        a, f = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        answers.append(ids[:a])
        foils.append(ids[a : a + f])
    return logits, reference, answers, foils


def padded(lists: list[list[int]]) -> torch.Tensor:
    width = max(map(len, lists))
    return torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in lists]).reshape(len(lists), width)


@given(batches())
@settings(max_examples=60, deadline=None)
def test_every_metric_is_its_definition(batch: tuple) -> None:
    logits, reference, answers, foils = batch
    for name in metrics_known():
        got = metric(name)(logits, padded(answers), padded(foils), reference)
        wanted = [
            plain(name, logits[row].tolist(), answers[row], foils[row], reference[row].tolist())
            for row in range(len(logits))
        ]
        assert got.shape == (len(logits),)
        assert got.tolist() == pytest.approx(wanted, abs=1e-12), name


@given(batches())
@settings(max_examples=30, deadline=None)
def test_accuracy_without_foils_is_top_one(batch: tuple) -> None:
    logits, reference, answers, foils = batch
    none = torch.empty(len(logits), 0, dtype=torch.long)
    some = [foils[0], *([] for _ in foils[1:])]  # foils in the first row only
    for given_foils, tensor in (([[]] * len(logits), none), (some, padded(some))):
        got = metric("accuracy")(logits, padded(answers), tensor)
        wanted = [
            plain("accuracy", logits[row].tolist(), answers[row], given_foils[row], reference[row].tolist())
            for row in range(len(logits))
        ]
        assert got.tolist() == wanted


def test_gradients_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, V, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, V, dtype=torch.float64)
    answers, foils = torch.tensor([[1, -1], [2, 3], [4, -1]]), torch.tensor([[5, 6], [7, -1], [8, 9]])
    for name in set(metrics_known()) - STEPS:
        measure = metric(name)
        assert torch.autograd.gradcheck(measure, (logits, answers, foils, reference)), name


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(2, 5000).bfloat16()
    got = metric("prob_diff")(logits, torch.tensor([[1], [2]]), torch.tensor([[3], [4]]))
    assert got.dtype == torch.float32
    exact = metric("prob_diff")(logits.double(), torch.tensor([[1], [2]]), torch.tensor([[3], [4]]))
    assert got.tolist() == pytest.approx(exact.tolist(), rel=1e-4)


def test_kl_of_a_certain_reference_is_finite() -> None:
    logits = torch.zeros(1, 4)
    reference = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    none = torch.empty(1, 0, dtype=torch.long)
    assert metric("kl")(logits, torch.tensor([[0]]), none, reference).item() == pytest.approx(math.log(4))
    assert metric("kl")(logits, torch.tensor([[0]]), none, logits).item() == 0.0


@pytest.mark.parametrize(
    ("name", "shapes", "says"),
    [
        ("logit_diff", ((2, 3, 5), (2, 1), (2, 1)), 'logits="last"'),
        ("logit_diff", ((2, 5), (1, 1), (2, 1)), "wrong shape"),
        ("logit_diff", ((2, 5), (2, 1), (2, 0)), "needs a foil"),
        ("kl", ((2, 5), (2, 1), (2, 1)), "reference"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, shapes: tuple, says: str) -> None:
    logits, answers, foils = (torch.zeros(*shape) for shape in shapes)
    with pytest.raises(MethodError, match=says):
        metric(name)(logits, answers.long(), foils.long())
    with pytest.raises(MethodError, match="logit_diff"):
        metric("logitdiff")


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = wide = 0
    for trial in range(200):
        mean, low, high = interval(rng.normal(1.0, 2.0, 40), seed=trial, draws=400)
        covered += low <= 1.0 <= high
        wide += low < mean < high
    assert wide == 200
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_of_shares_keeps_its_width() -> None:
    # Wilson's interval of 10 in 10 is [0.722, 1]
    mean, low, high = interval([1.0] * 10, share=True)
    assert (mean, high) == (1.0, 1.0)
    assert low == pytest.approx(0.7225, abs=1e-3)
    assert set(metrics_known()) >= SHARES


def test_interval_of_little() -> None:
    assert interval([2.5]) == (2.5, 2.5, 2.5)
    assert interval([float("nan"), 3.0]) == (3.0, 3.0, 3.0)
    assert all(math.isnan(x) for x in interval([]))
    values = list(np.random.default_rng(1).normal(size=30))
    assert interval(values, seed=3) == interval(values, seed=3) != interval(values, seed=4)
