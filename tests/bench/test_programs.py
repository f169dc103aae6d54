"""Transformer Programs: what is learned is discrete, its Python says the same, and the plain definition agrees."""

import itertools
from typing import Any

import pytest
import torch

from headwater.bench.programs import LearnedProgram, ProgramsConfig, ProgramShape, learn_program, sequence_tasks
from headwater.bench.programs.export import to_python
from headwater.bench.programs.learning import _Data, predictions
from headwater.bench.programs.model import Choices, ProgramModel, tie_breaks
from headwater.bench.programs.source import check_source, load_function
from headwater.bench.programs.tasks import BOS, SKIP
from headwater.core.errors import MethodError
from headwater.core.results import load_result


@pytest.mark.parametrize(
    ("task", "xs", "ys"),
    [
        ("reverse", "0123", "3210"),
        ("histogram", "0100", "3133"),
        ("sort", "3102", "0123"),
        ("most_frequent", "2112", "21--"),
        ("dyck1", "())(", None),
    ],
)
def test_tasks_mean_what_they_say(task: str, xs: str, ys: str | None) -> None:
    rows = sequence_tasks.get(task).sample(3000, vocabulary=4, length=4, seed=1)
    known = {"".join(inputs): outputs for inputs, outputs in rows}
    assert known[xs] == (list(ys) if ys is not None else ["open", "yes", "no", "no"])


def test_induction_answers_letters_seen_before() -> None:
    for xs, ys in sequence_tasks.get("induction").sample(50, length=8, seed=0):
        for i in range(0, 8, 2):
            before = [j for j in range(0, i, 2) if xs[j] == xs[i]]
            assert ys[i] == (xs[before[-1] + 1] if before else "-")
        assert set(ys[1::2]) == {SKIP}


def test_two_kinds_of_brackets_must_match() -> None:
    known = {"".join(xs): ys for xs, ys in sequence_tasks.get("dyck2").sample(3000, length=4, seed=0)}
    assert known["([])"] == ["open", "open", "open", "yes"]
    assert known["([)]"] == ["open", "open", "no", "no"]


def plain(model: ProgramModel, choices: Choices, tokens: list[int]) -> list[list[int]]:
    """The variables by the definition, one position and one module at a time."""
    T = len(tokens)
    pick = {name: value.argmax(-1) for name, value in choices.values.items()}
    variables = [list(tokens), list(range(T))]
    counts: list[list[int]] = []
    for layer in range(model.shape.layers):
        written = []
        for h in range(model.shape.heads):
            q, k, v = (variables[int(pick[f"{layer}.{part}"][h])] for part in "qkv")
            out = []
            for i in range(T):
                wanted = int(pick[f"{layer}.predicate"][h, q[i]])
                found = [j for j in range(T) if k[j] == wanted and (j <= i or not model.causal)]
                out.append(v[min(found, key=lambda j: (abs(i - j), j))] if found else v[0])
            written.append(out)
        for c in range(model.shape.counts):
            q, k = (variables[int(pick[f"{layer}.{part}"][c])] for part in ("cq", "ck"))
            rule = pick[f"{layer}.cpredicate"][c]
            counts.append(
                [sum(k[j] == int(rule[q[i]]) and (j <= i or not model.causal) for j in range(T)) for i in range(T)]
            )
        for m in range(model.shape.mlps):
            a, b = ([*variables, *written][: len(variables) + model.shape.heads] for _ in range(2))
            first, second = a[int(pick[f"{layer}.a"][m])], b[int(pick[f"{layer}.b"][m])]
            written.append([int(pick[f"{layer}.table"][m, x, y]) for x, y in zip(first, second, strict=True)])
        for m in range(model.shape.count_mlps):
            first, second = (counts[int(pick[f"{layer}.{part}"][m])] for part in ("na", "nb"))
            written.append([int(pick[f"{layer}.ntable"][m, x, y]) for x, y in zip(first, second, strict=True)])
        variables += written
    return variables


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_forward_and_source_equal_the_definition(causal: bool, seed: int) -> None:
    shape = ProgramShape(layers=2, heads=2, counts=1, mlps=1, count_mlps=1)
    words, answers = [BOS, "a", "b", "c"], ["no", "yes", "other"]
    model = ProgramModel(shape, d=6, T=6, classes=3, causal=causal, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.cat([torch.zeros(40, 1, dtype=torch.long), torch.randint(1, 4, (40, 5), generator=generator)], 1)
    hidden = model.variables(tokens, model.hard(), None)
    wanted = torch.tensor([plain(model, model.hard(), row) for row in tokens.tolist()])
    assert torch.equal(hidden.argmax(-1), wanted.transpose(1, 2))
    assert torch.equal(hidden.sum(-1), torch.ones(hidden.shape[:-1]))

    weights = torch.randint(-5, 6, (hidden.shape[2], 6, 3), generator=generator).double()
    for kept in ([7], list(range(hidden.shape[2])), [1, 4, 9]):
        used = torch.zeros_like(weights)
        used[kept] = weights[kept]
        program = load_function(to_python(model, used, kept, words, answers), "program")
        said = predictions(hidden, used)
        for row, classes in zip(tokens.tolist(), said.tolist(), strict=True):
            assert program([words[x] for x in row[1:]]) == [answers[c] for c in classes[1:]]


def test_soft_attention_becomes_the_hard_one() -> None:
    model = ProgramModel(ProgramShape(layers=1, heads=2), d=6, T=6, classes=2, causal=True, seed=3)
    tokens = torch.randint(0, 6, (20, 6), generator=torch.Generator().manual_seed(0))
    cold = model.variables(tokens, model.hard(), 1e-4)
    assert torch.allclose(cold, model.variables(tokens, model.hard(), None), atol=1e-4)


def test_nearer_wins_and_of_two_as_near_the_earlier() -> None:
    bias = tie_breaks(7, causal=False)
    for i, (j, k) in itertools.product(range(7), itertools.combinations(range(7), 2)):
        earlier = abs(i - j) <= abs(i - k)
        assert bool(bias[i, j] > bias[i, k]) is earlier
    assert bias.min() > -0.5  # a match at any distance stays above no match at the first position


def test_reverse_is_learned_and_its_source_is_the_model(tmp_path: Any) -> None:
    found = learn_program("reverse", length=4, vocabulary=4, steps=150, batch=64, train=150, test=200, seeds=2)
    rows = found.to_frame()
    assert set(rows["agreement"]) == {1.0}
    assert rows.filter(rows["best"])["accuracy"].item() == 1.0
    assert found.program(list("0123")) == list("3210")
    again = load_result(found.save(tmp_path / "result"), check=True)
    assert isinstance(again, LearnedProgram)
    assert again.source == found.source
    assert again.content_hash == found.content_hash


def test_the_same_seed_gives_the_same_program() -> None:
    options: dict[str, Any] = dict(length=4, vocabulary=4, steps=30, batch=32, train=100, test=100, seeds=1)
    first, second = (learn_program("histogram", **options) for _ in range(2))
    assert first.content_hash == second.content_hash
    assert learn_program("histogram", seed=5, **options).source != first.source


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "def program(xs):\n    return xs.__class__",
        "def program(xs):\n    return __import__('os')",
        "def program(xs):\n    while True: pass",
        "def program(xs):\n    return open('f')",
    ],
)
def test_only_generated_source_runs(source: str) -> None:
    with pytest.raises((MethodError, NameError)):
        load_function(source, "program")([1])


def test_source_that_is_not_python_is_refused() -> None:
    with pytest.raises(MethodError, match="not Python"):
        check_source("def (")


@pytest.mark.parametrize("options", [{"steps": 0}, {"cold": 9.0}, {"train": 3}, {"nosuch": 1}, {"seeds": "x"}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        learn_program("reverse", **options)
    assert ProgramsConfig().length == 8


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(MethodError, match="histogram"):
        learn_program("histogramm")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reverse", "histogram", "induction"])
def test_full_size_tasks_are_learned_exactly(task: str) -> None:
    found = learn_program(task, seeds=1, steps=800)
    assert found.facts["agreement"] == 1.0
    assert found.facts["best_accuracy"] > 0.99


def test_where_training_sees_nearly_all_sequences_a_quarter_is_held_out() -> None:
    task = sequence_tasks.get("dyck1")
    data = _Data.of(task, ProgramsConfig(length=6, train=2000, test=300))
    seen, held = {tuple(xs) for xs, _ in data.train}, [tuple(xs) for xs, _ in data.test]
    assert len(held) == len(set(held)) == 16 and len(seen) == 48  # of 64
    assert not seen & set(held)
