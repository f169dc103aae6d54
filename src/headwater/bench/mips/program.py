"""From a network to Python: its integer states or its finite-state machine, an update, an output, in few lines."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
import torch

from headwater.bench.mips.lattice import Integers, find_lattice
from headwater.bench.mips.machine import Key, Machine, find_machine, labelled, memory
from headwater.bench.mips.rnn import Network
from headwater.bench.mips.symbolic import Expression, affine_text, fit, rounded_least_squares


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """A program read off a network.

    route: what was read off, "lattice" (integer states) or "machine" (finitely many). form: the least simple kind of
    formula in it. states: how many integers, or how many states, it keeps.
    """

    source: str
    route: str
    form: str
    states: int


_ORDER = ("constant", "affine", "boolean", "piecewise", "comparison", "modular", "table")


def _form(expressions: Sequence[Expression]) -> str:
    return max((one.form for one in expressions), key=_ORDER.index)


def input_names(width: int) -> list[str]:
    """`x`, or `x0, x1` where a position has several inputs."""
    return ["x"] if width == 1 else [f"x{i}" for i in range(width)]


def synthesize(network: Network) -> Iterator[Synthesis]:
    """Programs for a trained network, the likeliest first; each has still to be checked on data."""
    routes = [from_lattice, from_machine]
    if network.arch.update != "linear":
        routes.reverse()
    for route in routes:
        found = route(network)
        if found is not None:
            yield found


# --- integer states ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _System:
    """z' = A z + B u + c; y = C z' + d (C of no rows where the output is not affine)."""

    A: Integers
    B: Integers
    c: Integers
    C: Integers

    def cost(self) -> float:
        parts = (self.A, self.B, self.c, self.C)
        return float(sum(np.abs(part).sum() + (part != 0).sum() + 0.25 * (part < 0).sum() for part in parts))

    def moved(self, turn: Integers, back: Integers) -> "_System":
        return _System(turn @ self.A @ back, turn @ self.B, turn @ self.c, self.C @ back)


def from_lattice(network: Network) -> Synthesis | None:
    """The program of a network whose hidden states are integer vectors; None where they are not, or no formula holds.

    The origin of the lattice is the first state or, where a bias that the update forgets shifts all later ones, the
    state after an input of zero.
    """
    task = network.task
    xs, _ = task.sample(300, seed=21)
    hidden = network.states(xs)
    states = hidden.numpy()
    if not np.isfinite(states).all():
        return None
    steps = _neighbours(network, xs[:60], states[:60])
    start = network.arch.start(1)
    ys = np.rint(network.output(hidden).numpy()).astype(np.int64)
    for origin in (start, network.step(start, torch.zeros(1, task.width, dtype=torch.long))):
        flat = states.reshape(-1, states.shape[-1]) - origin.numpy()
        lattice = find_lattice(np.concatenate([steps, flat]))
        if lattice is None or lattice.rank > 8:
            continue
        z, off = lattice.integers(flat)
        if off > 0.1 or np.abs(z).max(initial=0) > 10**6:
            continue
        z = z.reshape(*states.shape[:2], lattice.rank)
        before = np.concatenate([np.zeros_like(z[:, :1]), z[:, :-1]], axis=1)
        old, new, x, y = (part.reshape(-1, part.shape[-1]) for part in (before, z, xs, ys))
        found = _linear_program(old, new, x, y, len(task.alphabet)) or _other_program(old, new, x, y)
        if found is not None:
            return found
    return None


def _neighbours(network: Network, xs: Integers, hidden: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What one more of one input does to the states: the shortest steps of the lattice, to begin its basis with."""
    steps = []
    for t in range(xs.shape[1]):
        for i in range(xs.shape[2]):
            other = xs.copy()
            other[:, t, i] += np.where(xs[:, t, i] + 1 < network.task.high, 1, -1)
            steps.append((network.states(other).numpy() - hidden)[:, t:].reshape(-1, hidden.shape[-1]))
    return np.unique(np.concatenate(steps).round(9), axis=0)


def _linear_program(old: Integers, new: Integers, x: Integers, y: Integers, letters: int) -> Synthesis | None:
    """z' = A z + B x + c, or A z + e(x) over a small alphabet, in the coordinates where it is shortest."""
    rank = old.shape[1]
    inputs, plain = x, True
    rows = [rounded_least_squares(np.concatenate([old, inputs], 1), new[:, i]) for i in range(rank)]
    if any(row is None for row in rows):
        if letters > 100:
            return None
        _, index = np.unique(x, axis=0, return_inverse=True)
        inputs, plain = np.eye(int(index.max()) + 1, dtype=np.int64)[index.ravel()][:, 1:], False
        rows = [rounded_least_squares(np.concatenate([old, inputs], 1), new[:, i]) for i in range(rank)]
    known = [row for row in rows if row is not None]
    if len(known) < rank:
        return None
    whole = np.array(known, dtype=np.int64).reshape(rank, rank + inputs.shape[1] + 1)
    outputs = [rounded_least_squares(new, y[:, i]) for i in range(y.shape[1])]
    affine = [row[:-1] for row in outputs if row is not None]
    readout = np.array(affine if len(affine) == len(outputs) else [], dtype=np.int64).reshape(-1, rank)
    system = _System(whole[:, :rank], whole[:, rank:-1], whole[:, -1], readout)
    turn, back = _shortest(system)
    system, old, new = system.moved(turn, back), old @ turn.T, new @ turn.T
    names, state = input_names(x.shape[1]), [f"z{i}" for i in range(rank)]
    updates: list[Expression] = []
    for i in range(rank):
        if plain:
            text = affine_text([*state, *names], [*system.A[i], *system.B[i]], int(system.c[i]))
            updates.append(Expression(text=text, form="affine"))
            continue
        part = fit({name: x[:, j] for j, name in enumerate(names)}, new[:, i] - old @ system.A[i], table=True)
        if part is None:
            return None
        carried = affine_text(state, system.A[i].tolist())
        text = part.text if carried == "0" else f"{carried} + {part.text}"
        updates.append(Expression(text=text, form=part.form))
    said = [fit({name: new[:, j] for j, name in enumerate(state)}, y[:, i]) for i in range(y.shape[1])]
    return _integer_program(names, state, updates, said)


def _other_program(old: Integers, new: Integers, x: Integers, y: Integers) -> Synthesis | None:
    """Updates that are not linear: each coordinate a formula of the old ones and the input, with either sign."""
    rank = old.shape[1]
    if not 1 <= rank <= 2:
        return None
    names, state = input_names(x.shape[1]), [f"z{i}" for i in range(rank)]
    for signs in product((1, -1), repeat=rank):
        before, after = old * signs, new * signs
        features = {n: before[:, i] for i, n in enumerate(state)} | {n: x[:, i] for i, n in enumerate(names)}
        updates = [fit(features, after[:, i]) for i in range(rank)]
        if any(one is None for one in updates):
            continue
        said = [fit({n: after[:, j] for j, n in enumerate(state)}, y[:, i]) for i in range(y.shape[1])]
        found = _integer_program(names, state, [one for one in updates if one is not None], said)
        if found is not None:
            return found
    return None


def _integer_program(
    names: list[str], state: list[str], updates: list[Expression], said: Sequence[Expression | None]
) -> Synthesis | None:
    outputs = [one for one in said if one is not None]
    if len(outputs) < len(said):
        return None
    body = [f"{', '.join(state)} = {', '.join(one.text for one in updates)}"] if state else []
    source = _source(names, [f"{name} = 0" for name in state], [*body, f"ys.append({_result(outputs)})"])
    return Synthesis(source=source, route="lattice", form=_form([*updates, *outputs]), states=len(state))


def _shortest(system: _System) -> tuple[Integers, Integers]:
    """A unimodular change of coordinates, and its inverse, that makes the system short.

    Greedy steps (negate one coordinate, add one to another) from the lattice's own basis and, where it is one, from the
    basis of controllability (c, B, A B, A^2 B ...), in which a shift register is one.
    """
    rank = len(system.A)
    eye = np.eye(rank, dtype=np.int64)
    starts = [(eye, eye)]
    chain: list[Integers] = []
    for first in [*system.B.T[:4], system.c]:
        vector = first
        for _ in range(rank):
            trial = [*chain, vector]
            if len(trial) <= rank and np.linalg.matrix_rank(np.stack(trial)) == len(trial):
                chain = trial
            vector = system.A @ vector
    if len(chain) == rank and rank and round(abs(np.linalg.det(np.stack(chain)))) == 1:
        back = np.stack(chain).T
        starts.append((np.rint(np.linalg.inv(back)).astype(np.int64), back))
    return min((_greedy(system, *start) for start in starts), key=lambda pair: system.moved(*pair).cost())


def _greedy(system: _System, turn: Integers, back: Integers) -> tuple[Integers, Integers]:
    rank = len(turn)
    steps: list[tuple[Integers, Integers]] = []
    for i in range(rank):
        flip = np.eye(rank, dtype=np.int64)
        flip[i, i] = -1
        steps.append((flip, flip))
        for j in range(rank):
            for sign in (1, -1):
                if i != j:
                    one, undo = np.eye(rank, dtype=np.int64), np.eye(rank, dtype=np.int64)
                    one[i, j], undo[i, j] = sign, -sign
                    steps.append((one, undo))
    cost = system.moved(turn, back).cost()
    while True:
        trials = [(one @ turn, back @ undo) for one, undo in steps]
        costs = [system.moved(*trial).cost() for trial in trials]
        if not costs or min(costs) >= cost:
            return turn, back
        cost = min(costs)
        turn, back = trials[costs.index(cost)]


# --- finite-state machines --------------------------------------------------------------------------------------------

_MOST_STATES = 24  # of a table: a machine with more is memory of a network, not a program anyone reads


def from_machine(network: Network) -> Synthesis | None:
    """The program of a network with finitely many states: no memory, the last inputs, a formula, or a table."""
    if len(network.task.alphabet) > 130:
        return None
    machine = find_machine(network)
    if machine is None:
        return None
    return _of_memory(machine) or _of_rule(machine) or _of_table(machine)


def _rows(machine: Machine, labels: Sequence[int]) -> tuple[Integers, Integers, Integers]:
    """(label [N], letters [N, width], output [N, outputs]) of every arrow."""
    s = np.repeat(np.array(labels), len(machine.alphabet))
    x = np.tile(np.array(machine.alphabet), (machine.n, 1))
    y = np.array([row for said in machine.output for row in said])
    return s, x, y


def _of_memory(machine: Machine) -> Synthesis | None:
    """The state is the last few inputs: y = f(x, the one before, ...)."""
    k = memory(machine)
    names = input_names(len(machine.alphabet[0]))
    if k is None or (k and len(names) > 1):
        return None
    words = list(product(range(len(machine.alphabet)), repeat=k))
    past = [f"p{i + 1}" for i in range(k)]  # p1 is the last input
    rows_x, rows_past, rows_y = [], [], []
    for word in words:
        state = 0
        for letter in word:
            state = int(machine.next[state, letter])
        for index, letter in enumerate(machine.alphabet):
            rows_x.append(letter)
            rows_past.append([machine.alphabet[i][0] for i in reversed(word)])
            rows_y.append(machine.output[state][index])
    x, before, y = np.array(rows_x), np.array(rows_past).reshape(len(rows_x), k), np.array(rows_y)
    features = {n: x[:, i] for i, n in enumerate(names)} | {n: before[:, i] for i, n in enumerate(past)}
    said = [fit(features, y[:, i], table=True) for i in range(y.shape[1])]
    outputs = [one for one in said if one is not None]
    if len(outputs) < len(said):
        return None
    body = [f"ys.append({_result(outputs)})"]
    if k:
        body.append(f"{', '.join(past)} = {', '.join([names[0], *past[:-1]])}")
    source = _source(names, [f"{name} = 0" for name in past], body)
    return Synthesis(source=source, route="machine", form=_form(outputs), states=machine.n)


def _of_rule(machine: Machine) -> Synthesis | None:
    """Labels of the states for which the update is one formula, and the output another."""
    names = input_names(len(machine.alphabet[0]))
    for text, form, rule, start in _rules(machine, names):
        labels = labelled(machine, rule, start)
        if labels is None:
            continue
        s, x, y = _rows(machine, labels)
        features = {"s": s} | {name: x[:, i] for i, name in enumerate(names)}
        said = [fit(features, y[:, i]) for i in range(y.shape[1])]
        outputs = [one for one in said if one is not None]
        if len(outputs) == len(said):
            body = [f"ys.append({_result(outputs)})", f"s = {text}"]
            update = Expression(text=text, form=form)
            source = _source(names, [f"s = {start}"], body)
            return Synthesis(source=source, route="machine", form=_form([update, *outputs]), states=machine.n)
    return None


def _rules(machine: Machine, names: list[str]) -> Iterator[tuple[str, Any, Callable[[int, Key], int], int]]:
    """Candidate updates (text, form, function, label of the start), simple ones first."""
    values = [value for letter in machine.alphabet for value in letter]
    if len(names) == 1:
        for start in dict.fromkeys((0, min(values), max(values))):
            yield f"max(s, {names[0]})", "piecewise", lambda s, x: max(s, x[0]), start
            yield f"min(s, {names[0]})", "piecewise", lambda s, x: min(s, x[0]), start
    terms = list(names) + (["*".join(names)] if len(names) > 1 else [])
    weights = sorted(product((0, 1, -1, 2, -2), repeat=len(terms)), key=lambda w: (sum(map(abs, w)), min(w) < 0))
    n = machine.n
    for a, w, c in product((1, 2, -1, 0, 3), weights, (0, 1)):
        inner = affine_text(["s", *terms], [a, *w], c)

        def total(s: int, x: Key, a: int = a, w: tuple[int, ...] = w, c: int = c) -> int:
            product_term = [x[0] * x[1]] if len(x) == 2 else []
            return a * s + sum(k * v for k, v in zip(w, (*x, *product_term), strict=True)) + c

        yield f"({inner}) % {n}", "modular", lambda s, x, f=total: f(s, x) % n, 0
        if a == 1 and len(machine.alphabet) > 2:
            for divisor in range(2, 17):
                yield f"({inner}) // {divisor}", "modular", lambda s, x, f=total, d=divisor: f(s, x) // d, 0


def _of_table(machine: Machine) -> Synthesis | None:
    """A formula for every state's row where there is one, else the table as it is."""
    names = input_names(len(machine.alphabet[0]))
    if machine.n > _MOST_STATES or machine.n * len(machine.alphabet) > 400:
        return None
    if machine.n <= 6:
        # Any numbering of few states may turn the whole table into one formula.
        for rest in permutations(range(1, machine.n)):
            found = _numbered_program(machine, names, [0, *rest], table=False)
            if found is not None:
                return found
    return _numbered_program(machine, names, list(range(machine.n)), table=True)


def _numbered_program(machine: Machine, names: list[str], labels: list[int], *, table: bool) -> Synthesis | None:
    s, x, y = _rows(machine, labels)
    after = np.array(labels)[machine.next].ravel()
    features = {"s": s} | {name: x[:, i] for i, name in enumerate(names)}
    update = fit(features, after, table=table)
    said = [fit(features, y[:, i], table=table) for i in range(y.shape[1])]
    outputs = [one for one in said if one is not None]
    if update is None or len(outputs) < len(said):
        return None
    source = _source(names, ["s = 0"], [f"ys.append({_result(outputs)})", f"s = {update.text}"])
    return Synthesis(source=source, route="machine", form=_form([update, *outputs]), states=machine.n)


# --- source -----------------------------------------------------------------------------------------------------------


def _result(outputs: Sequence[Expression]) -> str:
    return outputs[0].text if len(outputs) == 1 else f"({', '.join(one.text for one in outputs)})"


def _source(names: list[str], start: list[str], body: list[str]) -> str:
    lines = ["def program(xs):", *(f"    {line}" for line in start), "    ys = []"]
    lines += [f"    for {', '.join(names)} in xs:", *(f"        {line}" for line in body), "    return ys"]
    return "\n".join(lines) + "\n"
