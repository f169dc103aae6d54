"""MIPS: tasks by their plain definitions, lattices and machines by theirs, and programs that equal the task."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headwater.bench.mips import MipsConfig, Task, mips, solve, synthesis, tasks
from headwater.bench.mips.lattice import find_lattice, reduced
from headwater.bench.mips.machine import Machine, find_machine, labelled, memory, minimized
from headwater.bench.mips.program import synthesize
from headwater.bench.mips.rnn import Architecture, Network, bilinear_jacobian, linear_enough, train
from headwater.bench.mips.symbolic import affine_text, fit
from headwater.bench.mips.synthesis import judge
from headwater.bench.programs.source import load_function
from headwater.core.errors import MethodError, StoreError
from headwater.core.results import load_result

# --- the tasks --------------------------------------------------------------------------------------------------------


def palindrome(xs: list[int]) -> int:
    return int(xs == xs[::-1])


def balanced(xs: list[int]) -> int:
    depth = 0
    for x in xs:
        depth += 1 if x == 0 else -1
        if depth < 0:
            return 0
    return int(depth == 0)


def majority(xs: list[int]) -> int:
    return max(sorted(set(xs)), key=xs.count)


def division(by: int) -> Callable[[list[int]], int]:
    def quotient_digit(xs: list[int]) -> int:
        number = int("".join(map(str, xs)), 2)
        return number // by - 2 * (number // 2 // by)

    return quotient_digit


def spring(xs: list[int]) -> int:
    position = velocity = 0
    for x in xs:
        velocity += x - position
        position += velocity
    return position


PLAIN: dict[str, Callable[[list[int]], int]] = {
    "bit_palindrome": palindrome,
    "balanced_parenthesis": balanced,
    "majority_0_3": majority,
    "div_3": division(3),
    "div_7": division(7),
    "newton_spring": spring,
    "sum_last3": lambda xs: sum(xs[-3:]),
    "prev2": lambda xs: xs[-3] if len(xs) > 2 else 0,
    "diff_last2": lambda xs: xs[-1] - (xs[-2] if len(xs) > 1 else 0),
    "diff_abs_values": lambda xs: abs(xs[-1]) - abs(xs[-2] if len(xs) > 1 else 0),
    "add_mod_5": lambda xs: sum(xs) % 5,
    "parity_bits_mod2": lambda xs: (len(xs) - 1) % 2,
    "parity_last3": lambda xs: sum(xs[-3:]) % 2,
    "parity_zeros": lambda xs: xs.count(0) % 2,
    "alternating_last3": lambda xs: int(([0, 0, *xs][-3:]) in ([0, 1, 0], [1, 0, 1])),
    "min_seen": min,
    "max_seen": max,
    "evens_counter": lambda xs: sum(x % 2 == 0 for x in xs),
    "perfect_square_detector": lambda xs: int(math.isqrt(xs[-1]) ** 2 == xs[-1]),
    "dithering": lambda xs: sum(xs) // 15 - sum(xs[:-1]) // 15,
}


@pytest.mark.parametrize("name", PLAIN)
def test_tasks_equal_their_plain_definition(name: str) -> None:
    xs, ys = tasks.get(name).sample(60, seed=4)
    for x, y in zip(xs[..., 0].tolist(), ys[..., 0].tolist(), strict=True):
        assert y == [PLAIN[name](x[: t + 1]) for t in range(len(x))]


@pytest.mark.parametrize(("name", "base"), [("binary_addition", 2), ("base_5_addition", 5)])
def test_addition_adds_the_numbers(name: str, base: int) -> None:
    xs, ys = tasks.get(name).sample(40, seed=1)
    for x, y in zip(xs.tolist(), ys[..., 0].tolist(), strict=True):
        a, b = (sum(row[i] * base**t for t, row in enumerate(x)) for i in (0, 1))
        assert sum(digit * base**t for t, digit in enumerate(y)) == (a + b) % base ** len(x)


def test_there_are_the_62_tasks_and_samples_are_repeatable() -> None:
    assert len(tasks.names()) == 62
    for name in tasks.names():
        task = tasks.get(name)
        (xs, ys), (again, _), (other, _) = (task.sample(5, seed=seed) for seed in (1, 1, 2))
        assert xs.shape == (5, task.length, task.width) and ys.shape == (5, task.length, task.outputs)
        assert np.array_equal(xs, again) and not np.array_equal(xs, other)
        assert xs.min() >= task.low and xs.max() < task.high
        shorter = task.reference(xs[:, :4])
        assert np.array_equal(shorter, ys[:, :4]), f"{name} reads ahead"


# --- lattices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_lattice_is_found_from_its_points(rank: int, noise: float) -> None:
    rng = np.random.default_rng(rank)
    basis = rng.normal(size=(rank, 6))
    points = rng.integers(*((-9, 10) if rank < 4 else (-2, 3)), (200, rank)) @ basis
    found = find_lattice(points + noise * rng.normal(size=points.shape))
    assert found is not None and found.rank == rank
    z, off = found.integers(points)
    assert off < 1e-3
    assert np.allclose(z @ found.basis, points, atol=1e-3)
    # the same lattice: each basis is an integer combination of the other
    for one, other in ((basis, found.basis), (found.basis, basis)):
        turn = one @ np.linalg.pinv(other)
        assert np.allclose(turn, np.rint(turn), atol=1e-3)
        assert abs(abs(np.linalg.det(turn)) - 1) < 1e-2


@pytest.mark.parametrize("values", [(6, 10, 15), (12, 18), (7,), (4, 6, 30)])
def test_in_one_dimension_the_lattice_is_the_greatest_common_divisor(values: tuple[int, ...]) -> None:
    found = find_lattice(np.array(values, dtype=float)[:, None] * 0.37)
    assert found is not None
    assert abs(found.basis[0, 0]) == pytest.approx(0.37 * math.gcd(*values))


def test_what_is_no_lattice_is_not_called_one() -> None:
    assert find_lattice(np.random.default_rng(0).normal(size=(200, 2))) is None
    nothing = find_lattice(np.zeros((5, 3)))
    assert nothing is not None and nothing.rank == 0


@pytest.mark.parametrize("seed", range(4))
def test_reduction_keeps_the_lattice_and_shortens_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    short = np.eye(3) + 0.1 * rng.normal(size=(3, 3))
    turn = np.array([[1, 7, -3], [0, 1, 12], [0, 0, 1]])
    found = reduced(turn @ short)
    change = found @ np.linalg.inv(short)
    assert np.allclose(change, np.rint(change), atol=1e-8) and abs(abs(np.linalg.det(change)) - 1) < 1e-8
    assert np.linalg.norm(found, axis=1).max() < 2.0


# --- machines ---------------------------------------------------------------------------------------------------------


def random_machine(seed: int, states: int = 7, letters: int = 2) -> Machine:
    rng = np.random.default_rng(seed)
    output = [[(int(rng.integers(2)),) for _ in range(letters)] for _ in range(states)]
    return Machine([(i,) for i in range(letters)], rng.integers(states, size=(states, letters)), output)


def said(machine: Machine, state: int, word: tuple[int, ...]) -> list[Any]:
    out = []
    for letter in word:
        out.append(machine.output[state][letter])
        state = int(machine.next[state, letter])
    return out


@pytest.mark.parametrize("seed", range(8))
def test_a_minimized_machine_says_the_same_with_the_fewest_states(seed: int) -> None:
    machine = random_machine(seed)
    small = minimized(machine)
    words = list(itertools.product((0, 1), repeat=8))
    assert all(said(machine, 0, word) == said(small, 0, word) for word in words)
    # by brute force: reachable states of which no two answer every word alike
    reached, queue = {0}, [0]
    while queue:
        for after in machine.next[queue.pop()].tolist():
            if after not in reached:
                reached.add(after)
                queue.append(after)
    different = {tuple(map(tuple, (said(machine, s, word) for word in words))) for s in reached}
    assert small.n == len(different)


def shift_register(k: int) -> Machine:
    words = list(itertools.product((0, 1), repeat=k))
    after = [[words.index((*word[1:], letter)) for letter in (0, 1)] for word in words]
    return Machine([(0,), (1,)], np.array(after), [[word[:1], word[:1]] for word in words])


def test_memory_is_how_many_letters_a_machine_keeps() -> None:
    for k in (1, 2, 3):
        assert memory(minimized(shift_register(k))) == k
    parity = Machine([(0,), (1,)], np.array([[0, 1], [1, 0]]), [[(0,), (1,)], [(1,), (0,)]])
    assert memory(parity) is None  # it never forgets
    assert labelled(parity, lambda s, x: (s + x[0]) % 2) == [0, 1]
    assert labelled(parity, lambda s, x: s + x[0]) is None
    assert labelled(parity, lambda s, x: 0) is None


@pytest.mark.parametrize("seed", range(3))
def test_a_machine_is_read_off_the_network_that_holds_it(seed: int) -> None:
    """Any machine is a network with one matrix a letter; turned by a random matrix it is no longer to be seen."""
    machine = minimized(random_machine(seed, states=5))
    rng = np.random.default_rng(seed)
    n = machine.n
    # states are (state, last letter's output), so that the output is a linear function of the state
    wide = 2 * n + 1
    matrices = np.zeros((2, wide, wide))
    matrices[:, :, 0] = 0
    for letter in (0, 1):
        for state in range(n):
            place = 1 + 2 * int(machine.next[state, letter]) + machine.output[state][letter][0]
            for column in ([0] if state == 0 else []) + [1 + 2 * state, 2 + 2 * state]:
                matrices[letter, place, column] = 1
    turn = np.linalg.qr(rng.normal(size=(wide, wide)))[0]
    turn[:, 0] = 0
    turn[0] = 0
    turn[1:, 1:] = np.linalg.qr(rng.normal(size=(wide - 1, wide - 1)))[0]
    turn[0, 0] = 1
    reads = np.array([0.0] + [float(i % 2) for i in range(2 * n)])

    def reference(xs: Any) -> Any:
        return machine.run(xs)

    task = Task(name="own", low=0, high=2, reference=reference, about="a random machine")
    weights = {
        "W": torch.as_tensor(turn @ matrices @ turn.T), "C": torch.as_tensor(reads @ turn.T)[None],
        "d": torch.zeros(1, dtype=torch.float64),
    }  # fmt: skip
    network = Network(task, Architecture(hidden=wide, update="bilinear"), weights, 0.0, 0)
    found = find_machine(network)
    assert found is not None
    assert found.n == n
    xs, ys = task.sample(50, length=30)
    assert np.array_equal(found.run(xs), ys)
    programs = list(synthesize(network))
    assert programs and judge(task, programs[0].source, MipsConfig(held_out=100)) == (1.0, 1.0)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "form"),
    [
        (lambda a, b: 3, "constant"),
        (lambda a, b: 2 * a - b + 1, "affine"),
        (lambda a, b: abs(a - b), "piecewise"),
        (lambda a, b: max(a, b) - a, "piecewise"),
        (lambda a, b: int(a + b > 3), "comparison"),
        (lambda a, b: int(a == b), "comparison"),
        (lambda a, b: (a + 2 * b) % 5, "modular"),
        (lambda a, b: (a + b) // 3, "modular"),
        (lambda a, b: (a * a + 3 * b) % 7, "table"),
    ],
)
def test_a_formula_is_right_on_every_row(rule: Callable[[int, int], int], form: str) -> None:
    rows = list(itertools.product(range(6), repeat=2))
    a, b = np.array(rows).T
    found = fit({"a": a, "b": b}, np.array([rule(*row) for row in rows]), table=True)
    assert found is not None and found.form == form
    program = load_function(f"def program(a, b):\n    return {found.text}\n", "program")
    assert [program(*row) for row in rows] == [rule(*row) for row in rows]
    if form == "table":
        assert fit({"a": a, "b": b}, np.array([rule(*row) for row in rows])) is None


def test_every_boolean_function_of_three_bits_is_found() -> None:
    rows = list(itertools.product((0, 1), repeat=3))
    columns = dict(zip("abc", np.array(rows).T, strict=True))
    for number in range(256):
        wanted = [number >> i & 1 for i in range(8)]
        found = fit(columns, np.array(wanted))
        assert found is not None
        program = load_function(f"def program(a, b, c):\n    return {found.text}\n", "program")
        assert [int(program(*row)) for row in rows] == wanted, (number, found.text)


def test_what_is_no_function_of_the_features_has_no_formula() -> None:
    assert fit({"a": np.array([0, 1, 1])}, np.array([0, 1, 2]), table=True) is None
    assert affine_text(["a", "b"], [1, -2], -3) == "a - 2*b - 3"
    assert affine_text(["a"], [0]) == "0"


# --- networks ---------------------------------------------------------------------------------------------------------


def test_the_jacobian_of_matrices_is_that_of_autograd() -> None:
    from headwater.bench.mips import rnn

    task = tasks.get("base_3_addition")
    arch = Architecture(hidden=3, update="bilinear")
    shapes = rnn._shapes(task, arch)
    flat = torch.randn(sum(math.prod(shape) for shape in shapes.values()), dtype=torch.float64)
    xs, _ = task.sample(5, length=6)
    inputs = rnn._encoded(task, arch, torch.as_tensor(xs))

    def outputs(theta: torch.Tensor) -> torch.Tensor:
        return rnn._outputs(rnn._unflatten(theta, shapes), arch, inputs).ravel()

    wanted = torch.func.jacrev(outputs)(flat)
    assert torch.allclose(bilinear_jacobian(rnn._unflatten(flat, shapes), arch, inputs), wanted, atol=1e-10)


def test_a_linear_network_is_only_asked_for_where_one_can_do() -> None:
    linear = {name for name in tasks.names() if linear_enough(tasks.get(name))}
    assert {"sum_all", "prev3", "sum_last4", "newton_spring", "diff_last2", "current_number"} <= linear
    assert not linear & {"abs_current", "parity_all", "max_seen", "add_mod_3", "evens_counter", "dithering"}


def test_training_fits_to_rounding_error_and_repeats() -> None:
    task = tasks.get("sum_last2")
    runs = [train(task, Architecture(hidden=2), seed=seed) for seed in range(4)]
    best = min(runs, key=lambda run: run.error)
    assert best.error < 1e-6
    assert train(task, Architecture(hidden=2), seed=runs.index(best)).error == best.error


# --- programs ---------------------------------------------------------------------------------------------------------

SMALL = ("sum_all", "prev1", "sum_last3", "bitwise_xor", "parity_all", "add_mod_3", "abs_current", "newton_spring")


@pytest.fixture(scope="module")
def small() -> Any:
    return mips(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_small_tasks_are_solved_by_a_program_that_is_the_task(name: str, small: Any) -> None:
    row = small.to_frame().filter(small.to_frame()["task"] == name).to_dicts()[0]
    assert row["solved"] and row["why"] == "" and row["held_out"] == row["longer"] == 1.0
    task, program = tasks.get(name), small.program(name)
    for length in (1, task.length, 5 * task.length):
        xs, ys = task.sample(50, length=length, seed=123)
        for x, y in zip(xs.tolist(), ys[..., 0].tolist(), strict=True):
            assert program([one[0] for one in x] if task.width == 1 else [tuple(one) for one in x]) == y
    assert row["form"] != "table", small.source(name)


def test_sources_are_what_one_would_write(small: Any) -> None:
    assert small.facts["solved"] == small.facts["n"] == len(SMALL)
    assert "z0 + x" in small.source("sum_all") or "z0 - x" in small.source("sum_all")
    assert "(s + x) % 3" in small.source("add_mod_3")
    assert small.source("bitwise_xor").count("\n") == 5
    with pytest.raises(MethodError, match="no program"):
        small.source("div_7")


def test_a_stored_result_runs_again(small: Any, tmp_path: Path) -> None:
    again = load_result(small.save(tmp_path / "result"), check=True)
    assert again.content_hash == small.content_hash
    assert again.program("parity_all")([1, 0, 1, 1]) == [1, 1, 0, 1]  # type: ignore[attr-defined]


def test_what_no_network_learns_is_unsolved() -> None:
    def reference(xs: Any) -> Any:
        rng = random.Random(0)
        table = {number: rng.randrange(50) for number in range(2**12)}
        out = np.zeros_like(xs)
        for i, row in enumerate(xs[..., 0].tolist()):
            for t in range(len(row)):
                out[i, t, 0] = table[int("".join(map(str, [1, *row[: t + 1]])), 2)]
        return out

    task = Task(name="noise", low=0, high=2, reference=reference, about="an arbitrary number for each word", length=4)
    row, source = solve(task, MipsConfig(networks=2, iterations=5))
    assert source is None and not row["solved"]
    assert (row["why"], row["networks"], row["held_out"]) == ("no network learned the task", 2, None)
    assert row["error"] > 0.5


def test_a_program_that_is_wrong_anywhere_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program right on short sequences only, and one that fails where nothing was chosen by."""
    task = tasks.get("parity_all")
    short = "def program(xs):\n    return [sum(xs[: i + 1]) % 2 if i < 10 else 0 for i in range(len(xs))]\n"
    shares = judge(task, short, MipsConfig())
    assert shares[0] == 1.0 and shares[1] < 0.1
    fake = synthesis.Synthesis(source=short, route="machine", form="modular", states=2)
    monkeypatch.setattr(synthesis, "synthesize", lambda network: iter([fake]))
    row, source = solve(task, MipsConfig(networks=4))
    assert source is None and not row["solved"]
    assert row["why"] == "the program found is not right on all fresh sequences" and row["longer"] == shares[1]
    monkeypatch.setattr(synthesis, "judge", lambda *_, confirm=False: (0.9, 0.9) if confirm else (1.0, 1.0))
    row, source = solve(task, MipsConfig(networks=4))
    assert source is None and not row["solved"] and "sequences after that" in row["why"]
    monkeypatch.setattr(synthesis, "synthesize", lambda network: iter(()))
    row, source = solve(task, MipsConfig(networks=4))
    assert source is None and row["why"].startswith("learned, but")


def test_programs_that_lack_a_row_are_wrong_and_not_an_error() -> None:
    source = "def program(xs):\n    return [{0: 0}[x] for x in xs]\n"
    assert judge(tasks.get("parity_all"), source, MipsConfig(held_out=20)) == (0.0, 0.0)


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mips(["sum_all", "prev1"], out=tmp_path)
    asked: list[str] = []
    solved = synthesis.solve

    def counted(task: Task, config: MipsConfig) -> Any:
        asked.append(task.name)
        return solved(task, config)

    monkeypatch.setattr(synthesis, "solve", counted)
    again = mips(["sum_all", "prev1", "bitwise_not"], out=tmp_path)
    assert asked == ["bitwise_not"]
    assert again.to_frame().head(2).equals(first.to_frame()) and again.source("prev1") == first.source("prev1")
    with pytest.raises(StoreError, match="another config"):
        mips("sum_all", out=tmp_path, seed=1)


@pytest.mark.parametrize("options", [{"networks": 0}, {"error": 0.7}, {"nosuch": 1}, {"seeds": "many"}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        mips("sum_all", **options)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(MethodError, match="parity_all"):
        mips("parity_al")
