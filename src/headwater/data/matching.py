"""Where terms stand in a piece of a corpus: all of them at once, in one pass.

Text is scanned by Aho and Corasick's automaton (`ahocorasick_rs`), token ids by a trie that is walked from all
positions at a time. Both give the same: mentions, in positions of the whole piece.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError

Ints = NDArray[np.int64]
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Mentions:
    """Mentions in a piece. term, start, end: [n], a span start:end of positions, sorted by term and start.

    document: [n] number within the piece; sequence: [documents] which sequence of the piece each document belongs to.
    word, sentence: [n], or empty where they were not asked for.
    """

    term: Ints
    start: Ints
    end: Ints
    document: Ints
    sequence: Ints
    word: Ints
    sentence: Ints


class TextMatcher:
    """Finds surface forms in documents. whole_words: a form that begins (ends) with a letter, digit or underscore must
    not continue a word there."""

    def __init__(self, forms: Sequence[Sequence[str]], *, whole_words: bool, ignore_case: bool) -> None:
        try:
            import ahocorasick_rs as ac
        except ImportError:
            raise MethodError("counting in text needs ahocorasick_rs", fix="pip install 'headwater[data]'") from None
        self._lower = ignore_case
        patterns, self._terms_of = _patterns([[self._fold(form) for form in own] for own in forms])
        self._whole = whole_words
        self._first = np.array([_is_word(pattern[0]) for pattern in patterns], dtype=bool)
        self._last = np.array([_is_word(pattern[-1]) for pattern in patterns], dtype=bool)
        self._automaton = ac.AhoCorasick(patterns, matchkind=ac.MatchKind.Standard)

    def _fold(self, text: str) -> str:
        return text.lower() if self._lower else text

    def find(self, documents: Sequence[str], *, words: bool, sentences: bool) -> Mentions:
        """The mentions in these documents."""
        texts = [self._fold(text) for text in documents]
        starts = np.cumsum([0, *(len(text) + 1 for text in texts)])[:-1]
        whole = "\0".join(texts)
        try:
            matches = self._automaton.find_matches_as_indexes(whole, overlapping=True)
        except (
            UnicodeEncodeError
        ):  # JSON may hold halves of surrogate pairs, which are no text; places stay as they are
            whole = _HALVES.sub("\ufffd", whole)
            matches = self._automaton.find_matches_as_indexes(whole, overlapping=True)
        found = np.array(matches, dtype=np.int64)
        which, start, end = found.reshape(-1, 3).T
        codes = np.empty(0, dtype=np.uint32)
        if len(which) and (self._whole or words or sentences):
            codes = np.frombuffer(whole.encode("utf-32-le"), dtype=np.uint32)
        if self._whole and len(which):
            table = _word_table()
            before = np.where(start > 0, table[codes[start - 1]], False)
            after = np.where(end < len(codes), table[codes[np.minimum(end, len(codes) - 1)]], False)
            keep = ~(self._first[which] & before) & ~(self._last[which] & after)
            which, start, end = which[keep], start[keep], end[keep]
        term, start, end = _mentions(*self._terms_of(which, start, end))
        none = np.empty(0, dtype=np.int64)
        word = sentence = none
        if words and len(term):
            inside = _word_table()[codes]
            begins = np.flatnonzero(inside & ~np.concatenate([[False], inside[:-1]]))
            word = np.searchsorted(begins, start, side="right") - 1
        if sentences and len(term):
            sentence = np.searchsorted(_breaks(codes), start, side="right")
        document = np.searchsorted(starts, start, side="right") - 1
        return Mentions(
            term=term, start=start, end=end, document=document, sequence=np.arange(len(texts)),
            word=word, sentence=sentence,
        )  # fmt: skip


class TokenMatcher:
    """Finds token sequences in token ids [n, T], never across sequences, nor across the token `separator`.

    edges: where words go on from token to token; a match must not continue a word. None: every token is a word of its
    own.
    """

    def __init__(
        self,
        forms: Sequence[Sequence[tuple[int, ...]]],
        *,
        separator: int | None = None,
        edges: "WordEdges | None" = None,
    ) -> None:
        patterns, self._terms_of = _patterns(forms)
        self._separator = separator
        self._edges = edges
        self._base = 1 + max((token for pattern in patterns for token in pattern), default=0)
        nodes: dict[tuple[int, int], int] = {}
        ending: dict[int, int] = {}
        for number, pattern in enumerate(patterns):
            node = 0
            for token in pattern:
                node = nodes.setdefault((node, token), len(nodes) + 1)
            ending[node] = number
        keys = np.array([node * self._base + token for node, token in nodes], dtype=np.int64)
        order = np.argsort(keys)
        self._keys = keys[order]
        self._to = np.array(list(nodes.values()), dtype=np.int64)[order]
        self._ending = np.full(len(nodes) + 1, -1, dtype=np.int64)
        for node, number in ending.items():
            self._ending[node] = number
        self._root = np.zeros(self._base, dtype=np.int64)
        for (node, token), to in nodes.items():
            if node == 0:
                self._root[token] = to
        self._depth = max((len(pattern) for pattern in patterns), default=0)

    def find(self, rows: NDArray[Any], *, words: bool, sentences: bool) -> Mentions:
        """The mentions in these sequences; words are tokens here."""
        if sentences:
            raise MethodError("token ids have no sentences", fix="Count by window or document, or count the text")
        flat = np.full((rows.shape[0], rows.shape[1] + 1), -1, dtype=np.int64)
        flat[:, :-1] = rows
        flat = flat.reshape(-1)
        known = (flat >= 0) & (flat < self._base)
        node = self._root[np.where(known, flat, 0)]
        at = np.flatnonzero(known & (node > 0))
        node = node[at]
        hits: list[tuple[Ints, Ints, Ints]] = []
        for depth in range(1, self._depth + 1):
            done = self._ending[node]
            if (done >= 0).any():
                hits.append((done[done >= 0], at[done >= 0], at[done >= 0] + depth))
            if depth == self._depth or not len(at):
                break
            following = flat[at + depth]  # a sequence ends in -1, so this stays within the piece
            fits = (following >= 0) & (following < self._base)
            at, key = at[fits], node[fits] * self._base + following[fits]
            place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
            fits = self._keys[place] == key
            at, node = at[fits], self._to[place[fits]]
        none = np.empty(0, dtype=np.int64)
        which, start, end = (np.concatenate(part) for part in zip(*hits, strict=True)) if hits else (none, none, none)
        if self._edges is not None and len(which):
            last = len(self._edges.begins) - 1
            tokens = np.where((flat >= 0) & (flat < last), flat, last)
            keep = ~self._edges.joined(tokens, start) & ~self._edges.joined(tokens, end)
            which, start, end = which[keep], start[keep], end[keep]
        term, start, end = _mentions(*self._terms_of(which, start, end))
        cut = flat == -1 if self._separator is None else (flat == -1) | (flat == self._separator)
        firsts = np.concatenate([[0], np.flatnonzero(cut)[:-1] + 1]).astype(np.int64)
        document = np.searchsorted(firsts, start, side="right") - 1
        if self._separator is not None and len(term):
            keep = np.searchsorted(firsts, end - 1, side="right") - 1 == document
            term, start, end, document = term[keep], start[keep], end[keep], document[keep]
        return Mentions(
            term=term, start=start, end=end, document=document, sequence=firsts // (rows.shape[1] + 1),
            word=start if words else none, sentence=none,
        )  # fmt: skip


def encoder(tokenizer: Any) -> Callable[[str], list[tuple[int, ...]]]:
    """How a surface form may stand in token ids: as the tokenizer writes it alone, and after a space."""
    unknown = tokenizer.unk_token_id

    def encode(form: str) -> list[tuple[int, ...]]:
        written = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (form, f" {form}")]
        end = tokenizer.eos_token_id
        kept = [ids for ids in written if ids and (unknown not in ids or unknown is None or unknown == end)]
        return list(dict.fromkeys(kept))

    return encode


@dataclass(frozen=True, kw_only=True)
class WordEdges:
    """Where words go on from token to token. begins, ends: [V] whether a token's text begins (ends) inside a word.
    cut: [2, V] whether it begins (ends) within a character, so that the tokens beside it decide. spelled: the bytes of
    each token. The last entry of all is what lies between sequences."""

    begins: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    spelled: list[bytes]

    def joined(self, tokens: Ints, places: Ints) -> NDArray[np.bool_]:
        """[n] whether a word goes on from the token before a place to the token at it."""
        before, after = tokens[places - 1], tokens[places]
        left, right = self.ends[before], self.begins[after]
        for n in np.flatnonzero(self.cut[1][before]).tolist():
            left[n] = _is_word(self._text(tokens[max(0, places[n] - _LONGEST) : places[n]])[-1:])
        for n in np.flatnonzero(self.cut[0][after]).tolist():
            right[n] = _is_word(self._text(tokens[places[n] : places[n] + _LONGEST])[:1])
        return left & right & (places > 0)

    def _text(self, tokens: Ints) -> str:
        return b"".join(self.spelled[token] for token in tokens.tolist()).decode(errors="replace")


_LONGEST = 4  # bytes of a character
_BETWEEN = b"\n"  # no part of a word


def word_edges(tokenizer: Any) -> WordEdges | None:
    """Edges of words by the tokens' own text; None where no token marks a space: then each is a word of its own."""
    vocabulary = tokenizer.get_vocab()
    if not any(token[:1] in ("Ġ", "▁", " ") and len(token) > 1 for token in vocabulary):
        return None
    size = max(vocabulary.values()) + 2
    begins, ends, cut = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool), np.zeros((2, size), dtype=bool)
    spelled = [_BETWEEN] * size
    special = set(tokenizer.all_special_tokens)
    bytes_of = _byte_letters() if any(token[:1] == "Ġ" for token in vocabulary) else {}
    for token, number in vocabulary.items():
        if token in special or not token:
            continue
        if bytes_of and all(letter in bytes_of for letter in token):
            spelled[number] = bytes(bytes_of[letter] for letter in token)
        else:
            spelled[number] = token.replace("▁", " ").encode()
        text = spelled[number].decode(errors="replace")
        begins[number], ends[number] = _is_word(text[0]), _is_word(text[-1])
        cut[:, number] = text[0] == "\ufffd", text[-1] == "\ufffd"
    return WordEdges(begins=begins, ends=ends, cut=cut, spelled=spelled)


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (Radford et al., 2019): printable ones are their
    own, the others follow from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _patterns(
    forms: Sequence[Sequence[Any]],
) -> tuple[list[Any], Callable[[Ints, Ints, Ints], tuple[Ints, Ints, Ints]]]:
    """The distinct forms, and a function from their matches to matches of terms: a form may belong to several."""
    terms: dict[Any, list[int]] = {}
    for number, own in enumerate(forms):
        for form in dict.fromkeys(own):
            terms.setdefault(form, []).append(number)
    sizes = np.array([len(numbers) for numbers in terms.values()], dtype=np.int64)
    firsts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    flat = np.array([number for numbers in terms.values() for number in numbers], dtype=np.int64)

    def of(which: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
        index, place = spread(firsts, which)
        return flat[place], start[index], end[index]

    return list(terms), of


def spread(firsts: Ints, which: Ints) -> tuple[Ints, Ints]:
    """For groups firsts[g] : firsts[g + 1], all members of each group in `which`: (place in `which`, member)."""
    size = firsts[which + 1] - firsts[which]
    index = np.repeat(np.arange(len(which), dtype=np.int64), size)
    before = np.repeat(np.cumsum(size) - size, size)
    return index, np.repeat(firsts[which], size) + np.arange(len(index), dtype=np.int64) - before


def _mentions(term: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
    """Spans that are not within another span of the same term, each once, sorted by term and start."""
    order = np.lexsort((-end, start, term))
    term, start, end = term[order], start[order], end[order]
    if len(term):
        key = term * (int(end.max()) + 1) + end  # greater than any of an earlier term
        within = np.concatenate([[False], np.maximum.accumulate(key)[:-1] >= key[1:]])
        term, start, end = term[~within], start[~within], end[~within]
    return term, start, end


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"  # of nothing: no


@functools.cache
def _word_table() -> NDArray[np.bool_]:
    """[0x110000] whether a character is part of a word."""
    return np.fromiter((_is_word(chr(code)) for code in range(0x110000)), dtype=bool, count=0x110000)


def _breaks(codes: NDArray[np.uint32]) -> Ints:
    """Where sentences end: positions after `.`, `!` or `?` before white space, after a new line, between documents."""
    stop = np.isin(codes, np.array([ord(letter) for letter in ".!?"], dtype=np.uint32))
    space = np.isin(codes, np.array([ord(letter) for letter in " \t\r\n\0\u00a0"], dtype=np.uint32))
    ends = np.isin(codes, np.array([ord("\n"), 0], dtype=np.uint32))
    ends[:-1] |= stop[:-1] & space[1:]
    return np.flatnonzero(ends) + 1


def check_forms(forms: Iterable[Sequence[Any]]) -> None:
    """Refuse to match nothing at all."""
    if not any(len(own) for own in forms):
        raise MethodError("none of the terms can be written in these tokens", fix="Give the corpus's own tokenizer")
