"""How often terms, and pairs of terms, stood in a corpus, by step: exact, in one pass, resumable."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError, did_you_mean
from headwater.core.files import holds_something, store_error, to_json, write_whole
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, load_result, register_result
from headwater.data.corpus import Corpus, Cursor, Piece
from headwater.data.matching import Ints, Mentions, TextMatcher, TokenMatcher, check_forms, encoder, spread, word_edges
from headwater.data.pairs import Pairs, read_pairs

SCOPES = ("document", "sentence", "window")
_FORMAT = 2  # of what is kept: 2 sees a word's end beside marks of several bytes


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """How to count.

    scope: what a pair must stand in together: a "document" (of token ids: a sequence), a "sentence" (text only: up to a
    `.`, `!` or `?` before white space, or a line's end), or a "window". window: how far apart two mentions may begin,
    in words (of token ids: tokens).
    ranges: steps at which counts are cut, rising: (0, 10, 100) counts steps 0..9 and 10..99. Empty: all in one.
    whole_words: a form does not match inside a longer word. ignore_case: text only. separator: a token id that ends a
    document. save_seconds: how often what was counted is put on the disk; no result depends on it.
    """

    scope: str = "document"
    window: int | None = None
    ranges: tuple[int, ...] = ()
    whole_words: bool = True
    ignore_case: bool = False
    separator: int | None = None
    save_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise MethodError("unknown scope", got=repr(self.scope), wanted=did_you_mean(str(self.scope), SCOPES))
        if (self.scope == "window") != (self.window is not None) or (self.window is not None and self.window < 1):
            got = f"scope={self.scope}, window={self.window}"
            raise MethodError("a window has a width", got=got, wanted="both, or neither")
        ranges = tuple(self.ranges)
        if len(ranges) == 1 or sorted({*ranges}) != list(ranges) or (ranges and ranges[0] < 0):
            raise MethodError("ranges are two or more rising steps", got=list(ranges))
        object.__setattr__(self, "ranges", ranges)


@register_result
class Counts(Result):
    """Counts of terms and pairs.

    `tables["terms"]`: term, first, last (the steps first .. last-1), n (mentions: spans of any of its forms, of which
    none lies within another), documents (those with a mention). `tables["pairs"]`: subject, object, first, last, n,
    documents; n counts documents or sentences in which both are mentioned without overlapping, or within a window the
    pairs of mentions. Facts: sequences, documents, size (characters, or tokens), form, scope, unwritable (terms that
    the tokenizer cannot write).
    """

    kind: ClassVar[str] = "counts"
    main: ClassVar[str | None] = "pairs"

    def by(self, step: int, table: str = "pairs") -> pl.DataFrame:
        """What the checkpoint of a step had seen: the sum over the ranges before it. Refuses a step within a range, and
        ranges that leave out the first steps."""
        frame = self.tables[table]
        edges = sorted({*frame["first"].to_list(), *frame["last"].to_list()})
        if edges and edges[0] > 0:
            got, wanted = f"ranges from step {edges[0]} on", "ranges from 0 on"
            raise MethodError("what a checkpoint had seen is counted from the beginning", got=got, wanted=wanted)
        if step not in edges:
            raise MethodError("counts were not cut at this step", got=step, wanted=f"one of {edges}")
        names = [name for name in ("term", "subject", "object") if name in frame.columns]
        before = pl.col("last") <= step
        n = [pl.when(before).then(pl.col(name)).otherwise(0).sum().alias(name) for name in ("n", "documents")]
        return frame.group_by(names, maintain_order=True).agg(n)


def count(
    corpus: Any,
    pairs: Any,
    *,
    terms: Iterable[str] = (),
    tokenizer: Any = None,
    encode: Callable[[str], Sequence[Sequence[int]]] | None = None,
    out: str | Path | None = None,
    config: CountConfig | None = None,
    **options: Any,
) -> Counts:
    """Count terms and pairs in a corpus, thousands at once, in one pass. Options are those of `CountConfig`.

    corpus: a `Corpus`, or what `Corpus.open` takes. pairs: as `read_pairs` takes them. In token ids a form is looked
    for as `tokenizer` writes it alone and after a space, or as `encode(form)` says (token sequences). out: a folder;
    what was counted is kept there, and the same command goes on after `kill -9` to the identical result, which lies in
    `out/counts`.

    Raises MethodError for settings that do not fit, StoreError for a folder of another count.
    Known failure: co-occurrence is no statement: a pair may stand together for another relation (a capital that is the
    largest city); and names that a tokenizer writes otherwise in context (after a bracket, in capitals) are missed.
    """
    started = time.monotonic()
    corpus, wanted = Corpus.open(corpus), read_pairs(pairs, terms=terms)
    config = configured(CountConfig, config, options)
    matcher, unwritable = _matcher(corpus, wanted, config, tokenizer, encode)
    settings = {name: value for name, value in asdict(config).items() if name != "save_seconds"}
    store = _Store(Path(out), _hash(corpus, wanted, settings, tokenizer)) if out is not None else None
    if store is not None and (done := store.finished()) is not None:
        return done
    tally = Tally(wanted, config, corpus.batch_size or 1)
    cursor = store.load(tally) if store is not None else None
    if cursor is None and corpus.form == "tokens" and config.ranges:
        cursor = {"sequence": min(tally.edges[0], corpus.n_sequences)}
    saved = time.monotonic()
    for first, piece, after in track(_until(corpus.pieces(cursor), tally.edges), f"counting in {corpus.name}"):
        tally.add(first, piece, matcher)
        cursor = after
        if store is not None and time.monotonic() - saved >= config.save_seconds:
            store.save(tally, after)
            saved = time.monotonic()
    tables = tally.tables()
    facts = tally.facts | {"form": corpus.form, "scope": config.scope, "unwritable": unwritable}
    provenance = Provenance.collect(seconds=time.monotonic() - started)
    result = Counts(tables=tables, facts=facts, config=settings | {"batch": corpus.batch_size}, provenance=provenance)
    if store is not None:
        store.save(tally, cursor or {})
        result.save(store.folder / "counts")
    return result


class Tally:
    """The counts so far: [ranges, terms or pairs, 2], mentions or co-occurrences, and documents."""

    def __init__(self, pairs: Pairs, config: CountConfig, batch: int) -> None:
        self.pairs, self.config, self.batch = pairs, config, batch
        self.edges = [step * batch for step in config.ranges]
        ranges = max(1, len(self.edges) - 1)
        self.terms = np.zeros((ranges, len(pairs.terms), 2), dtype=np.int64)
        self.together = np.zeros((ranges, len(pairs.of), 2), dtype=np.int64)
        self.facts = {"sequences": 0, "documents": 0, "size": 0}
        order = np.argsort(pairs.of[:, 0], kind="stable")
        self._sorted = order  # pairs by subject
        bounds = np.searchsorted(pairs.of[order, 0], np.arange(len(pairs.terms) + 1))
        self._firsts = bounds.astype(np.int64)

    def add(self, first: int, piece: Any, matcher: TextMatcher | TokenMatcher) -> None:
        scope = self.config.scope
        found = matcher.find(piece, words=scope == "window", sentences=scope == "sentence")
        numbers = first + found.sequence
        if self.edges:
            span = np.searchsorted(self.edges, numbers, side="right") - 1
            span[numbers >= self.edges[-1]] = -1
        else:
            span = np.zeros(len(numbers), dtype=np.int64)
        inside = span >= 0
        self.facts["documents"] += int(inside.sum())
        counted = np.unique(found.sequence[inside])
        self.facts["sequences"] += len(counted)
        each = [len(piece[i]) for i in counted.tolist()] if isinstance(piece, list) else [piece.shape[1] * len(counted)]
        self.facts["size"] += sum(each)
        keep = inside[found.document]
        one = Found(found, keep)
        _put(self.terms, 0, span[one.document], one.term)
        documents, who = _distinct(one.document, one.term, len(self.pairs.terms))
        _put(self.terms, 1, span[documents], who)
        if scope == "window":
            pair, document = self._near(one)
        else:
            pair, document = self.together_in(one, one.sentence if scope == "sentence" else one.document)
        _put(self.together, 0, span[document], pair)
        documents, who = _distinct(document, pair, max(1, len(self.pairs.of)))
        _put(self.together, 1, span[documents], who)

    def together_in(self, one: "Found", unit: Ints) -> tuple[Ints, Ints]:
        """(pair, document) of each unit in which mentions of both stand and do not overlap."""
        if not len(one.term):
            return one.term, one.term
        n = len(self.pairs.terms)
        keys = unit * n + one.term
        order = np.argsort(keys, kind="stable")
        keys, places = np.unique(keys[order], return_index=True)
        ends = np.minimum.reduceat(one.end[order], places)
        starts = np.maximum.reduceat(one.start[order], places)
        document = one.document[order][places]
        index, member = spread(self._firsts, keys % n)
        pair = self._sorted[member]
        key = keys[index] // n * n + self.pairs.of[pair, 1]
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        # some mention of the one ends before some mention of the other begins
        both = (keys[at] == key) & ((ends[index] <= starts[at]) | (ends[at] <= starts[index]))
        return pair[both], document[index[both]]

    def _near(self, one: "Found") -> tuple[Ints, Ints]:
        """(pair, document) of each pair of mentions that begin at most a window apart and do not overlap."""
        if not len(one.term):
            return one.term, one.term
        width = int(self.config.window or 0)
        # documents lie more than a window apart, so that no window reaches across
        place = one.word + one.document * (width + 1)
        size = int(place.max()) + 2 * width + 2
        keys = one.term * size + place + width
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        index, member = spread(self._firsts, one.term)
        pair = self._sorted[member]
        middle = self.pairs.of[pair, 1] * size + place[index] + width
        low = np.searchsorted(ordered, middle - width, side="left")
        high = np.searchsorted(ordered, middle + width, side="right")
        sizes = high - low
        near = np.repeat(np.arange(len(low), dtype=np.int64), sizes)
        other = order[np.repeat(low - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(near))]
        mine = index[near]
        apart = (one.end[mine] <= one.start[other]) | (one.end[other] <= one.start[mine])
        return pair[near[apart]], one.document[mine[apart]]

    def tables(self) -> dict[str, pl.DataFrame]:
        steps = list(self.config.ranges) or [0, -(-self.facts["sequences"] // self.batch)]
        spans = list(itertools.pairwise(steps))

        def table(columns: dict[str, list[str]], counts: NDArray[np.int64]) -> pl.DataFrame:
            size, numbers = counts.shape[1], dict.fromkeys(("first", "last", "n", "documents"), pl.Int64)
            return pl.DataFrame(
                {name: values * len(spans) for name, values in columns.items()}
                | {
                    "first": [a for a, _ in spans for _ in range(size)],
                    "last": [b for _, b in spans for _ in range(size)],
                    "n": counts[:, :, 0].reshape(-1).tolist(),
                    "documents": counts[:, :, 1].reshape(-1).tolist(),
                },
                schema=dict.fromkeys(columns, pl.String) | numbers,
            )

        return {
            "terms": table({"term": list(self.pairs.terms)}, self.terms),
            "pairs": table({"subject": self.pairs.subjects, "object": self.pairs.objects}, self.together),
        }


class Found:
    """Mentions that lie in a range."""

    def __init__(self, found: Mentions, keep: NDArray[np.bool_]) -> None:
        self.term, self.start, self.end = found.term[keep], found.start[keep], found.end[keep]
        self.document = found.document[keep]
        self.word = found.word[keep] if len(found.word) else found.word
        self.sentence = found.sentence[keep] if len(found.sentence) else found.sentence


def _put(counts: NDArray[np.int64], what: int, span: Ints, who: Ints) -> None:
    size = counts.shape[1]
    counts[:, :, what] += np.bincount(span * size + who, minlength=counts.shape[0] * size).reshape(counts.shape[:2])


def _distinct(document: Ints, who: Ints, size: int) -> tuple[Ints, Ints]:
    keys = np.unique(document * size + who)
    return keys // size, keys % size


def _until(pieces: Iterator[Piece], edges: list[int]) -> Iterator[Piece]:
    for piece in pieces:
        if edges and piece[0] >= edges[-1]:
            return
        yield piece


def _matcher(
    corpus: Corpus, pairs: Pairs, config: CountConfig, tokenizer: Any, encode: Any
) -> tuple[TextMatcher | TokenMatcher, list[str]]:
    if corpus.form == "text":
        if config.separator is not None:
            raise MethodError("texts have no separator", got=config.separator)
        return TextMatcher(pairs.forms, whole_words=config.whole_words, ignore_case=config.ignore_case), []
    tokenizer = tokenizer if tokenizer is not None else corpus.tokenizer
    if config.ignore_case or config.scope == "sentence":
        raise MethodError("token ids know neither case nor sentences", fix="Count the text, or leave these options out")
    if encode is None and tokenizer is None:
        raise MethodError(f"{corpus.name} holds token ids", fix="Give tokenizer= (or --tokenizer), or encode=")
    write = encode or encoder(tokenizer)
    forms = [[tuple(map(int, ids)) for form in own for ids in write(form) if len(ids)] for own in pairs.forms]
    check_forms(forms)
    edges = word_edges(tokenizer) if config.whole_words and tokenizer is not None else None
    unwritable = [name for name, own in zip(pairs.terms, forms, strict=True) if not own]
    return TokenMatcher(forms, separator=config.separator, edges=edges), unwritable


def _hash(corpus: Corpus, pairs: Pairs, settings: dict[str, Any], tokenizer: Any) -> str:
    words = None if tokenizer is None else sorted(tokenizer.get_vocab().items())
    whole = [_FORMAT, corpus.identity(), pairs.terms, pairs.forms, pairs.of, settings, words]
    return hashlib.sha256(to_json(whole, indent=None).encode()).hexdigest()


class _Store:
    """The folder of a count: `state.safetensors`, one file replaced whole, and in the end `counts/`."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key, self.file = folder, key, folder / "state.safetensors"

    def finished(self) -> Counts | None:
        if not (self.folder / "counts" / "result.json").exists():
            return None
        self._head()
        result = load_result(self.folder / "counts")
        return result if isinstance(result, Counts) else None

    def load(self, tally: Tally) -> Cursor | None:
        head = self._head()
        if head is None:
            return None
        import safetensors.numpy

        tensors = safetensors.numpy.load(self.file.read_bytes())
        tally.terms[:], tally.together[:] = tensors["terms"], tensors["together"]
        tally.facts.update(json.loads(head["facts"]))
        return json.loads(head["cursor"])

    def save(self, tally: Tally, cursor: Cursor) -> None:
        import safetensors.numpy

        head = {"key": self.key, "cursor": to_json(cursor, indent=None), "facts": to_json(tally.facts, indent=None)}
        write_whole(
            self.file, safetensors.numpy.save({"terms": tally.terms, "together": tally.together}, metadata=head)
        )

    def _head(self) -> dict[str, str] | None:
        import safetensors

        if not self.file.exists():
            if holds_something(self.folder):
                raise StoreError("will not count into a folder that holds something else", got=self.folder)
            return None
        try:
            with safetensors.safe_open(self.file, framework="numpy") as file:
                head = file.metadata() or {}
        except OSError as error:
            raise store_error(error, self.file, "read") from error
        except safetensors.SafetensorError as error:
            raise StoreError(f"{self.file} is damaged", got=error, fix="Remove the folder to count again") from None
        if head.get("key") != self.key:
            raise StoreError(
                f"{self.folder} holds a count of another corpus, other pairs or other settings",
                fix="Choose another folder with --out, or remove this one",
            )
        return head
