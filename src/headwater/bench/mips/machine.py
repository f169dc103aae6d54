"""From a network to a finite-state machine: hidden states that cannot be told apart are one state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headwater.bench.mips.lattice import whitened
from headwater.bench.mips.rnn import Network

Key = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Machine:
    """A Mealy machine: in state s on letter a it goes to next[s, a] and says output[s, a]. It starts in state 0."""

    alphabet: list[Key]
    next: np.ndarray[Any, np.dtype[np.int64]]
    output: list[list[Key]]

    @property
    def n(self) -> int:
        return len(self.next)

    def run(self, xs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What it says along sequences [N, T, width] -> [N, T, outputs]."""
        index = {letter: i for i, letter in enumerate(self.alphabet)}
        out = []
        for sequence in xs.tolist():
            state, said = 0, []
            for x in sequence:
                letter = index[tuple(x)]
                said.append(self.output[state][letter])
                state = int(self.next[state, letter])
            out.append(said)
        return np.array(out)


def find_machine(
    network: Network, *, most: int = 400, tolerances: tuple[float, ...] = (1e-4, 0.01, 0.05, 0.15)
) -> "Machine | None":
    """Explore a network from its first state by every letter; states within a tolerance (in whitened units) are one.

    Tried from the finest tolerance to the coarsest; None where more than `most` states appear at each. The machine is
    minimized (Moore, 1956). Known failure: a network that keeps what it no longer needs has ever new states at a fine
    tolerance, and at a coarse one states that matter may be merged: the caller has to check the machine on data.
    """
    alphabet = network.task.alphabet
    letters = torch.tensor(alphabet)
    xs, _ = network.task.sample(256, seed=3)
    seen = network.states(xs).reshape(-1, network.arch.hidden).numpy()
    if not np.isfinite(seen).all():
        return None
    axes, scales = whitened(seen)
    white = (axes / scales[:, None]).T if len(axes) else np.zeros((network.arch.hidden, 1))
    for tolerance in tolerances:
        found = _explore(network, letters, white, tolerance, most)
        if found is not None:
            return minimized(Machine(alphabet, *found))
    return None


def _explore(
    network: Network, letters: torch.Tensor, white: np.ndarray[Any, Any], tolerance: float, most: int
) -> tuple[Any, Any] | None:
    states = [network.arch.start(1)[0]]
    places = states[0].numpy()[None] @ white
    arrows: list[list[int]] = []
    said: list[list[Key]] = []
    with torch.no_grad():
        while len(arrows) < len(states):
            here = states[len(arrows)].expand(len(letters), -1)
            after = network.step(here, letters)
            said.append([tuple(map(int, row)) for row in network.output(after).round().tolist()])
            row = []
            for h, place in zip(after, after.numpy() @ white, strict=True):
                distance = np.abs(places - place).max(1)
                nearest = int(distance.argmin())
                if distance[nearest] > tolerance:
                    if len(states) == most:
                        return None
                    nearest = len(states)
                    states.append(h)
                    places = np.vstack([places, place])
                row.append(nearest)
            arrows.append(row)
    return np.array(arrows), said


def minimized(machine: Machine) -> Machine:
    """The smallest machine that says the same: states are split until those together say and do the same (Moore)."""
    classes = _numbered(machine.output)
    while True:
        finer = _numbered(
            [(own, tuple(classes[i] for i in row)) for own, row in zip(classes, machine.next, strict=True)]
        )
        if len(set(finer)) == len(set(classes)):
            break
        classes = finer
    # numbered in the order in which states are first reached, so that the start is 0
    order: list[int] = []
    members = {own: state for state, own in reversed(list(enumerate(classes)))}
    queue = [classes[0]]
    while queue:
        own = queue.pop(0)
        if own in order:
            continue
        order.append(own)
        queue += [classes[i] for i in machine.next[members[own]]]
    place = {own: i for i, own in enumerate(order)}
    arrows = [[place[classes[i]] for i in machine.next[members[own]]] for own in order]
    return Machine(machine.alphabet, np.array(arrows), [machine.output[members[own]] for own in order])


def _numbered(keys: list[Any]) -> list[int]:
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(_frozen(key), len(numbers)) for key in keys]


def _frozen(key: Any) -> Any:
    return tuple(_frozen(one) for one in key) if isinstance(key, list | tuple) else key


def labelled(machine: Machine, rule: Callable[[int, Key], int], start: int = 0) -> list[int] | None:
    """Integers for the states such that `rule(label, letter)` is the label after the letter; None where it cannot be.

    The start gets `start`, and every other label follows; two labels for a state, or one for two states, refute the
    rule.
    """
    labels: dict[int, int] = {0: start}
    queue = [0]
    while queue:
        state = queue.pop()
        for letter, after in zip(machine.alphabet, machine.next[state].tolist(), strict=True):
            label = rule(labels[state], letter)
            if after not in labels:
                if label in labels.values():
                    return None
                labels[after] = label
                queue.append(after)
            elif labels[after] != label:
                return None
    return [labels[state] for state in range(machine.n)]


def memory(machine: Machine, longest: int = 5) -> int | None:
    """The least k such that the last k letters say which state it is in (with first positions read as zeros); or None.

    Such a machine is a shift register: its states can be written as its last k inputs.
    """
    zero = (
        machine.alphabet.index((0,) * len(machine.alphabet[0]))
        if (0,) * len(machine.alphabet[0]) in machine.alphabet
        else None
    )
    if zero is None or machine.next[0, zero] != 0:
        return None
    if len(machine.alphabet) ** longest > 5000:
        longest = 2 if len(machine.alphabet) <= 70 else 1
    for k in range(longest + 1):
        if machine.n <= len(machine.alphabet) ** k and len(_after(machine, k)) == len(machine.alphabet) ** k:
            return k
    return None


def _after(machine: Machine, k: int) -> dict[tuple[int, ...], int]:
    """Words of k letters after which the state is the same wherever they began -> that state."""
    found: dict[tuple[int, ...], int] = {}
    words: list[tuple[tuple[int, ...], frozenset[int]]] = [((), frozenset(range(machine.n)))]
    for _ in range(k):
        words = [
            ((*word, a), frozenset(int(machine.next[s, a]) for s in states))
            for word, states in words
            for a in range(len(machine.alphabet))
        ]
    for word, states in words:
        if len(states) == 1:
            found[word] = next(iter(states))
    return found
