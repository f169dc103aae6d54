"""Generators of behaviors: one file each, registered by name. They know no tokenizer; binding sorts out what fits
one."""

import importlib
import inspect
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from headwater.core.errors import BehaviorError, did_you_mean
from headwater.core.registry import Registry as _Registry

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior

SPLITS = ("train", "test")
Spans = dict[str, tuple[int, int]]
T = TypeVar("T")
BUILT_IN = (
    "agreement",
    "arithmetic",
    "capitals",
    "colors",
    "conflict",
    "greater_than",
    "induction",
    "ioi",
    "parentheses",
    "refusal",
    "successor",
)
FROM_LISTS = ("mib",)
"""Files whose generators read lists that the user points them to."""
_SLOT = re.compile(r"\{(\w+)\}")
# How often a generator may draw a prompt it has already made before it is taken to have no more.
_PATIENCE = 400


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row of a behavior; `slices` become columns, `alternatives` are further (counterfactual, foils)."""

    prompt: str
    counterfactual: str
    answers: Sequence[str]
    foils: Sequence[str]
    positions: Spans = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""
    split: str = ""
    slices: Mapping[str, str] = field(default_factory=dict)
    alternatives: Sequence[tuple[str, Sequence[str]]] = ()


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a generator gives: its pairs, and what should be known about them."""

    pairs: list[Pair]
    metric: str = "logit_diff"
    source: str = "headwater's own templates"
    licence: str = "Apache-2.0"
    note: str = ""


class Generators(_Registry["Callable[..., Made]"]):
    """The registry of generators; the built-in ones are imported when a name is first asked for."""

    _imported = False

    def names(self) -> list[str]:
        self._import()
        return super().names()

    def get(self, name: str) -> "Callable[..., Made]":
        self._import()
        return super().get(name)

    def _import(self) -> None:
        if not self._imported:
            self._imported = True
            for file in (*BUILT_IN, *FROM_LISTS):
                importlib.import_module(f"{__name__}.{file}")


registry = Generators("behavior", error=BehaviorError)
generator = registry.register


def generate(name: str, *, n: int | None = None, seed: int = 0, options: Mapping[str, Any] | None = None) -> "Behavior":
    """The behavior that the generator `name` makes; its first docstring line says what, its keyword arguments are the
    options.

    Raises BehaviorError for an unknown name, an unknown option, or more pairs than it can make.
    """
    from headwater.behavior.table import Behavior

    make = registry.get(name)
    options = dict(options or {})
    parameters = inspect.signature(make).parameters
    known = {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key in options:
        if key not in known:
            raise BehaviorError(
                f"the behavior {name!r} has no such option", got=repr(key), wanted=did_you_mean(key, known)
            )
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 2):
        raise BehaviorError(
            f"cannot make so many pairs of {name!r}",
            got=f"n={n!r}",
            wanted="a whole number of at least 2, half for each split",
        )
    if not isinstance(seed, int):
        raise BehaviorError("a seed is a whole number", got=repr(seed))
    # Seeded by a text: Random hashes it with sha512, the same in every process.
    made = make(n, random.Random(f"headwater:{name}:{seed}"), **options)
    about = {
        "generator": name,
        "options": {**known, **options},
        "seed": seed,
        "source": made.source,
        "licence": made.licence,
        "note": made.note,
    }
    slices = dict.fromkeys(key for pair in made.pairs for key in pair.slices)
    width = max(4, len(str(len(made.pairs))))
    rows = [
        {
            "id": f"{name}-{index:0{width}d}",
            "prompt": pair.prompt,
            "counterfactual": pair.counterfactual,
            "answers": list(pair.answers),
            "foils": list(pair.foils),
            "positions": pair.positions,
            "variables": dict(pair.variables),
            "template": pair.template,
            "split": pair.split,
            **({"alternatives": _alternatives(pair)} if any(p.alternatives for p in made.pairs) else {}),
            **{key: pair.slices.get(key, "") for key in slices},
        }
        for index, pair in enumerate(made.pairs)
    ]
    return Behavior.from_rows(rows, name=name, metric=made.metric, about=about)


def _alternatives(pair: Pair) -> list[dict[str, Any]]:
    return [{"counterfactual": text, "foils": list(foils)} for text, foils in pair.alternatives]


def fill(template: str, values: Mapping[str, str]) -> tuple[str, Spans]:
    """Put `values` into the `{slots}` of a template; also the character span of each slot (of its last use)."""
    out: list[str] = []
    spans: Spans = {}
    length = done = 0
    for slot in _SLOT.finditer(template):
        before, value = template[done : slot.start()], values[slot[1]]
        length += len(before)
        spans[slot[1]] = (length, length + len(value))
        length += len(value)
        out += [before, value]
        done = slot.end()
    return "".join([*out, template[done:]]), spans


def last_word(prompt: str) -> tuple[int, int]:
    """The character span of the last word, for a position named END."""
    return prompt.rstrip().rfind(" ") + 1, len(prompt)


def halves(things: Iterable[T], rng: random.Random) -> dict[str, list[T]]:
    """Shuffle and cut in two: what the train pairs may use and what the test pairs may, with nothing in common."""
    mixed = list(things)
    rng.shuffle(mixed)
    middle = (len(mixed) + 1) // 2
    return {"train": mixed[:middle], "test": mixed[middle:]}


def draw(
    n: int, rng: random.Random, make: Callable[[int, str, random.Random], Pair | None], *, name: str
) -> list[Pair]:
    """`n` pairs with different prompts, train and test in turn; `make(index, split, rng)` draws one, None where a
    draw is no good."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for index in range(n):
        split = SPLITS[index % 2]
        for _try in range(_PATIENCE):
            pair = make(index, split, rng)
            if pair is not None and pair.prompt not in seen:
                seen.add(pair.prompt)
                pairs.append(pair)
                break
        else:
            raise BehaviorError(
                f"the behavior {name!r} cannot make so many different prompts",
                got=f"n={n}",
                wanted=f"at most about {len(pairs)}",
            )
    return pairs


def words(text: str) -> list[str]:
    """The words of a text, for lists of words."""
    return text.split()


def one_of(option: str, value: object, known: Sequence[object]) -> None:
    """Raise BehaviorError where an option's value is not a known one."""
    if value not in known:
        raise BehaviorError(
            f"unknown value of the option {option!r}", got=repr(value), wanted=" or ".join(map(repr, known))
        )


def whole(option: str, value: object, low: int, high: int) -> None:
    """Raise BehaviorError where an option is not a whole number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BehaviorError(
            f"the option {option!r} is out of range", got=repr(value), wanted=f"a whole number from {low} to {high}"
        )
