"""Which sequences mention both terms of a pair."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError
from headwater.data.counts import CountConfig, Found, Tally
from headwater.data.matching import Ints, TextMatcher, TokenMatcher, check_forms, encoder, word_edges
from headwater.data.pairs import Pairs, read_pairs


class Mentioning:
    """Finds the sequences in which both terms of a pair are mentioned (by mentions that do not overlap).

    pairs: as `read_pairs` takes them. Of token ids a term is looked for as `tokenizer` writes it alone and after a
    space, or as `encode(form)` says; of texts in the text itself.

    Known failure: as of `count`: standing together is no statement, and other forms of a name are missed.
    """

    def __init__(
        self, pairs: Any, *, tokenizer: Any = None, encode: Callable[[str], Sequence[Sequence[int]]] | None = None
    ) -> None:
        self.pairs: Pairs = read_pairs(pairs)
        self._tally = Tally(self.pairs, CountConfig(), 1)
        self._tokenizer, self._encode = tokenizer, encode
        self._matcher: TextMatcher | TokenMatcher | None = None

    def find(self, piece: Any) -> tuple[Ints, Ints]:
        """(pair, sequence): each sequence of the piece (token ids [n, T], or texts) that mentions both of a pair."""
        if self._matcher is None:
            self._matcher = self._make(texts=isinstance(piece, list))
        found = self._matcher.find(piece, words=False, sentences=False)
        one = Found(found, np.ones(len(found.term), dtype=bool))
        one.document = found.sequence[found.document]
        pair, sequence = self._tally.together_in(one, one.document)
        order = np.lexsort((sequence, pair))
        return pair[order], sequence[order]

    def any(self, piece: Any) -> NDArray[np.bool_]:
        """[n] whether each sequence mentions both terms of any of the pairs."""
        out = np.zeros(len(piece), dtype=bool)
        out[self.find(piece)[1]] = True
        return out

    def _make(self, *, texts: bool) -> TextMatcher | TokenMatcher:
        if texts:
            return TextMatcher(self.pairs.forms, whole_words=True, ignore_case=False)
        if self._encode is None and self._tokenizer is None:
            raise MethodError("terms are looked for in token ids", fix="Give tokenizer= (or --tokenizer), or encode=")
        write = self._encode or encoder(self._tokenizer)
        forms = [[tuple(map(int, ids)) for form in own for ids in write(form) if len(ids)] for own in self.pairs.forms]
        check_forms(forms)
        edges = word_edges(self._tokenizer) if self._tokenizer is not None else None
        return TokenMatcher(forms, edges=edges)
