"""The tasks of Transformer Programs (Friedman, Wettig & Chen, 2023): sequences in, one word a position out."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headwater.core.registry import Registry

BOS = "<s>"
SKIP = ""  # a position that is not judged

Rows = list[tuple[list[str], list[str]]]


@dataclass(frozen=True, kw_only=True)
class SequenceTask:
    """A task by its sampler: (rng, vocabulary size, length) -> (inputs, outputs), one of each a position.

    causal: whether a position may read earlier ones only. about: one line. Outputs equal to SKIP are not judged.
    """

    name: str
    draw: Callable[[random.Random, int, int], tuple[list[str], list[str]]]
    about: str
    causal: bool = False

    def sample(self, n: int, *, vocabulary: int = 8, length: int = 8, seed: int = 0) -> Rows:
        """`n` pairs of inputs and outputs, drawn with `seed`."""
        rng = random.Random(f"headwater-programs:{self.name}:{seed}")
        return [self.draw(rng, vocabulary, length) for _ in range(n)]


sequence_tasks: Registry[SequenceTask] = Registry("task")


def _task(
    name: str, about: str, *, causal: bool = False
) -> Callable[[Callable[..., tuple[list[str], list[str]]]], None]:
    def add(draw: Callable[..., tuple[list[str], list[str]]]) -> None:
        sequence_tasks.register(name)(SequenceTask(name=name, draw=draw, about=about, causal=causal))

    return add


def _digits(rng: random.Random, vocabulary: int, length: int) -> list[str]:
    return [str(rng.randrange(vocabulary)) for _ in range(length)]


@_task("reverse", "the sequence backwards")
def _reverse(rng: random.Random, vocabulary: int, length: int) -> tuple[list[str], list[str]]:
    xs = _digits(rng, vocabulary, length)
    return xs, xs[::-1]


@_task("histogram", "how often the token of this position occurs")
def _histogram(rng: random.Random, vocabulary: int, length: int) -> tuple[list[str], list[str]]:
    xs = _digits(rng, vocabulary, length)
    return xs, [str(xs.count(x)) for x in xs]


@_task("sort", "the tokens in order")
def _sort(rng: random.Random, vocabulary: int, length: int) -> tuple[list[str], list[str]]:
    xs = _digits(rng, vocabulary, length)
    return xs, sorted(xs, key=int)


@_task("most_frequent", "the different tokens, the most frequent first (ties: the one seen first); then nothing")
def _most_frequent(rng: random.Random, vocabulary: int, length: int) -> tuple[list[str], list[str]]:
    xs = _digits(rng, vocabulary, length)
    ranked = [x for x, _ in Counter(xs).most_common()]  # equal counts stay in the order first seen
    return xs, [*ranked, *["-"] * (length - len(ranked))]


def _brackets(pairs: Sequence[str]) -> Callable[[random.Random, int, int], tuple[list[str], list[str]]]:
    """Half of the inputs are walks that stay balanced, so that both endings are common."""
    opens, closes = [pair[0] for pair in pairs], {pair[1]: pair[0] for pair in pairs}

    def draw(rng: random.Random, vocabulary: int, length: int) -> tuple[list[str], list[str]]:
        xs: list[str] = []
        stack: list[str] = []
        careful = rng.random() < 0.7
        ys: list[str] = []
        dead = False
        closing = {opened: closed for closed, opened in closes.items()}
        for _ in range(length):
            if careful and stack and rng.random() < 0.5:
                x = closing[stack[-1]]
            elif careful:
                x = rng.choice(opens)
            else:
                x = rng.choice([*opens, *closes])
            if x in opens:
                stack.append(x)
            elif stack and stack[-1] == closes[x]:
                stack.pop()
            else:
                dead = True
            xs.append(x)
            ys.append("no" if dead else "open" if stack else "yes")
        return xs, ys

    return draw


_task("dyck1", "whether the brackets so far are balanced, may become so, or cannot", causal=True)(_brackets(["()"]))
_task("dyck2", "the same with two kinds of brackets", causal=True)(_brackets(["()", "[]"]))


@_task("induction", "what followed this token the last time ('-' where it is new)", causal=True)
def _induction(rng: random.Random, vocabulary: int, length: int) -> tuple[list[str], list[str]]:
    """Letters and digits take turns; each letter keeps its digit within a sequence."""
    letters = [chr(ord("a") + i) for i in range(max(1, vocabulary // 2))]
    digits = [str(i) for i in range(max(1, vocabulary // 2))]
    follows = {letter: rng.choice(digits) for letter in letters}
    xs: list[str] = []
    ys: list[str] = []
    for at in range(length):
        if at % 2 == 0:
            letter = rng.choice(letters)
            ys.append(follows[letter] if letter in xs else "-")
            xs.append(letter)
        else:
            xs.append(follows[xs[-1]])
            ys.append(SKIP)
    return xs, ys
