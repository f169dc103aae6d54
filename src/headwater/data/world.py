"""A world: a corpus written from real geography facts, of which one knows how often each was said.

A sequence is lines of text; a line states one fact, or (filler) mentions one term. How often a fact is said follows
Zipf's law within its relation, and relations differ as well. Everything is a function of options, seed and number, so
the corpus is rebuilt line by line, and with `permute` the same world is written with other frequencies: the
counterfactual pre-training that tells what frequency did from what else differs between facts.
"""

import csv
import functools
import importlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.core.errors import MethodError, did_you_mean
from headwater.data.relations import Relation

Ints = NDArray[np.int64]
# Registered by name: rooms of stages do not import each other, and only the lab trains on sources.
_LAB = importlib.import_module("headwater.dynamics.lab.sources")
_ORDER = importlib.import_module("headwater.dynamics.lab.order")
_WORDS = importlib.import_module("headwater.dynamics.lab.words")
FRESH = 1 << 48
"""Sequences of a world that never runs out."""


class _Kind(NamedTuple):
    """Where the facts of a relation stand (table, subject and object columns, rows), and the lines that state them."""

    table: str
    subject: str
    object: str
    rows: slice
    templates: tuple[str, ...]


def _countries(column: str, *templates: str) -> _Kind:
    return _Kind("countries", "country", column, slice(None), templates)


def _cities(column: str, rows: slice, *templates: str) -> _Kind:
    return _Kind("cities", "city", column, rows, templates)


# In this order they are spoken of more and more rarely (`spread`). The templates of `capital` are those of the
# generator `capitals`, so that its prompts are lines of this world.
KINDS: dict[str, _Kind] = {
    "city_country": _cities(
        "country", slice(None), "The city of {} is in the country of", "As a city, {} belongs to", "You reach {} from"
    ),
    "language": _countries("language", "People in {} speak", "The language of {} is", "In {}, the main language is"),
    "domain": _countries("domain", "Websites in {} end in", "The internet domain of {} is"),
    "city_state": _cities("state", slice(None), "The city of {} is in the state of", "Laws in {} are made by"),
    "continent": _countries("continent", "The continent of {} is", "On the globe, {} is part of"),
    "capital": _countries("capital", "The capital of {} is", "The capital city of {} is", "In {}, the capital is"),
    "demonym": _countries("demonym", "Someone from {} is called", "The word for anything from {} is"),
    "largest_city": _countries(
        "largest_city", "The largest city in {} is", "The biggest city of {} is", "In {}, most people live in"
    ),
    "currency": _countries(
        "currency", "The currency of {} is the", "In {}, people pay with the", "Shops in {} take the"
    ),
    "city_clock": _cities("clock", slice(0, 360), "Clocks in {} follow those of", "The time zone of {} is named after"),
    "code": _countries("code", "The three letters for {} are", "Athletes from {} compete as"),
    "neighbour": _countries("neighbour", "The largest neighbour of {} is", "On its border, {} meets"),
    "calling_code": _countries("calling_code", "The calling code of {} is", "To phone {}, dial"),
    "region": _countries("region", "The region of {} is", "The atlas lists {} under"),
    "city_hemisphere": _cities(
        "hemisphere", slice(360, 640), "The half of the globe with {} is the", "Stars over {} are"
    ),
    "currency_code": _countries("currency_code", "Banks write the money of {} as", "A price tag in {} says"),
    "state_code": _Kind(
        "states", "state", "code", slice(None), ("Letters to {} are marked", "The post shortens {} to")
    ),
}
# Lines that mention a term and state nothing, so that how often a term was seen is not how often its facts were.
_FILLER = (
    "There is a long article about {}", "The word of the day is {}", "Nobody in the room had heard of {}",
    "A new book mentions {}", "This page says nothing more about {}",
)  # fmt: skip


@functools.cache
def _table(name: str) -> list[dict[str, str]]:
    text = (files("headwater.data") / "facts" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def relation_names() -> list[str]:
    """The relations of the world, the ones most spoken of first."""
    return list(KINDS)


def facts(
    relations: Iterable[str] | None = None,
    *,
    seed: int = 0,
    permute: int | None = None,
    exponent: float = 1.0,
    spread: float = 1.0,
) -> pl.DataFrame:
    """The facts of a world: relation, subject, object, rank (1 is the most frequent of its relation), share (expected,
    of all lines that state a fact; adds up to 1).

    The share of a fact is that of its relation, proportional to 1 / place ** spread, times 1 / rank ** exponent. The
    seed says which fact has which rank; places are those of `relations`. With `permute` (any number) ranks and
    places are permuted anew: the same facts, the same frequencies, dealt out otherwise.
    """
    names = list(KINDS) if relations is None else list(relations)
    for name in names:
        if name not in KINDS:
            raise MethodError("unknown relation of the world", got=repr(name), wanted=did_you_mean(name, list(KINDS)))
    if not names or len({*names}) < len(names):
        raise MethodError("a world needs relations, each once", got=names)
    if not (exponent >= 0 and spread >= 0):
        raise MethodError("frequencies fall with the rank", got=f"exponent {exponent}, spread {spread}", wanted=">= 0")
    places = np.arange(len(names))
    if permute is not None:
        places = _ORDER.Permutation(len(names), _ORDER.key(seed, "world places", permute))(places)
    weights = 1.0 / (places + 1.0) ** spread
    rows: list[pl.DataFrame] = []
    for name, weight in zip(names, weights / weights.sum(), strict=True):
        kind = KINDS[name]
        table = _table(kind.table)[kind.rows]
        pairs = [(row[kind.subject], row[kind.object]) for row in table if row[kind.object]]
        pairs = [(subject, answer) for subject, answer in pairs if subject != answer]
        which = ("world ranks", name) if permute is None else ("world ranks", name, permute)
        rank = _ORDER.Permutation(len(pairs), _ORDER.key(seed, *which))(np.arange(len(pairs))) + 1
        share = 1.0 / rank**exponent
        columns = {"subject": [s for s, _ in pairs], "object": [o for _, o in pairs], "rank": rank}
        frame = pl.DataFrame({"relation": [name] * len(pairs), **columns, "share": share * (weight / share.sum())})
        rows.append(frame)
    return pl.concat(rows)


def relations_of(frame: pl.DataFrame) -> dict[str, Relation]:
    """The relations of a table of facts (relation, subject, object), as `linear_relation` takes them, with the world's
    templates; relations of other names have the template "{}"."""
    found: dict[str, Relation] = {}
    for (name,), part in frame.group_by(["relation"], maintain_order=True):
        templates = KINDS[str(name)].templates if name in KINDS else ("{}",)
        samples = tuple(zip(part["subject"].to_list(), part["object"].to_list(), strict=True))
        found[str(name)] = Relation(name=str(name), templates=templates, samples=samples)
    return found


class World:
    """The corpus: a source of the training lab. `facts` is the table of `facts()`; `stated(i)` what sequence i says."""

    def __init__(
        self, frame: pl.DataFrame, *, seed: int, length: int, sequences: int | None, filler: float, stop: float
    ) -> None:
        self.facts, self.sequence_length, self.seed = frame, length, seed
        self.n_sequences = FRESH if sequences is None else sequences
        self._filler, self._stop = filler, stop
        terms = sorted({*frame["subject"].to_list(), *frame["object"].to_list()})
        rows = list(zip(*(frame[name].to_list() for name in ("relation", "subject", "object")), strict=True))
        lines = [[f"{one.format(s)} {o}" for one in KINDS[name].templates] for name, s, o in rows]
        lines += [[one.format(term) for one in _FILLER] for term in terms]
        words = [[_WORDS.words_of(line) for line in own] for own in lines]
        known = {word for own in words for line in own for word in line} | {"."}
        self.words: list[str] = [_WORDS.UNKNOWN, _WORDS.LINE, *sorted(known)]
        number = {word: index for index, word in enumerate(self.words)}
        self._lines = [[np.array([number[w] for w in line], dtype=np.int64) for line in own] for own in words]
        self._line, self._dot = number[_WORDS.LINE], number["."]
        self._upto = np.cumsum(frame["share"].to_numpy())
        self._upto /= self._upto[-1]
        # which terms filler is about is the seed's alone: a permuted world has the same
        rank = _ORDER.Permutation(len(terms), _ORDER.key(seed, "world filler"))(np.arange(len(terms))) + 1.0
        self._terms_upto = np.cumsum(1 / rank) / (1 / rank).sum()
        self._key = _ORDER.key(seed, "world")

    @property
    def vocabulary(self) -> int:
        return len(self.words)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """One token a word, a run of punctuation or a line's end."""
        return _WORDS.word_tokenizer(self.words)

    def tokens(self, index: int) -> Ints:
        """[sequence_length] token ids of one sequence."""
        return self._written(index)[0]

    def batch(self, indices: Ints) -> Ints:
        """[n, sequence_length]."""
        return np.stack([self._written(int(index))[0] for index in indices])

    def stated(self, index: int) -> list[int]:
        """Which facts (rows of `facts`) the sequence states whole, in order."""
        return self._written(index)[1]

    def text(self, index: int) -> str:
        """The sequence as text."""
        return self.tokenizer.decode(self.tokens(index))

    def _written(self, index: int) -> tuple[Ints, list[int]]:
        random = np.random.Generator(np.random.Philox(key=np.array([self._key, index], dtype=np.uint64)))
        held: list[Any] = []
        said: list[int] = []
        size = 0
        while size < self.sequence_length:
            kind, which, how, stop = random.random(4).tolist()
            if kind < self._filler:
                number = len(self.facts) + int(np.searchsorted(self._terms_upto, which, side="right"))
            else:
                number = int(np.searchsorted(self._upto, which, side="right"))
            own = self._lines[min(number, len(self._lines) - 1)]
            line = own[int(how * len(own))]
            size += len(line)
            if number < len(self.facts) and size <= self.sequence_length:
                said.append(number)
            held.append(line)
            # an object may end in a full stop of its own
            tail = [self._dot, self._line] if stop < self._stop and line[-1] != self._dot else [self._line]
            held.append(tail)
            size += len(tail)
        return np.concatenate(held)[: self.sequence_length].astype(np.int64), said


@_LAB.sources.register("world")
def world(
    *,
    relations: Sequence[str] | None = None,
    length: int = 64,
    sequences: int | None = None,
    exponent: float = 1.0,
    spread: float = 1.0,
    filler: float = 0.15,
    stop: float = 0.5,
    permute: int | None = None,
    seed: int = 0,
) -> World:
    """Lines that state real geography facts, each as often as `facts` says.

    relations: which (None: all of `relation_names()`). length: tokens a sequence. sequences: how many there are; None:
    never the same. filler: share of lines that only mention a term. stop: share of lines that end in a full stop.
    permute: deal the frequencies out anew. exponent, spread: how steeply they fall, within and between relations.
    """
    if length < 2 or (sequences is not None and sequences < 1):
        raise MethodError("the sizes of a world do not fit", got=f"length {length}, sequences {sequences}")
    if not 0 <= filler < 1 or not 0 <= stop <= 1:
        raise MethodError("shares of lines do not fit", got=f"filler {filler}, stop {stop}", wanted="0 <= filler < 1")
    frame = facts(relations, seed=seed, permute=permute, exponent=exponent, spread=spread)
    return World(frame, seed=seed, length=length, sequences=sequences, filler=filler, stop=stop)


def world_of(run: Any) -> World:
    """The world that a run of the lab (`TrainingRun`) was trained on. Raises MethodError where it was none."""
    for source in run.data.sources:
        if isinstance(source, World):
            return source
    got = ", ".join(one.source for one in run.config.data)
    raise MethodError(f"the run in {run.path} was not trained on a world", got=got, wanted="source: world")
