"""A source with wrong labels: what can only be learned by heart, beside what can be understood (Zhang et al., 2017)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError
from headwater.dynamics.lab.order import Permutation, key

_TRIES = 16


class Corrupted:
    """A source of which a share of the sequences carry, at the predicted tokens, those of another sequence.

    Which ones, and whose, is a function of the seed and the sequence's number. The labels keep their frequencies, as
    they are those of others; a sequence whose label nobody drawn for it differs from keeps its own (`corrupted` says
    which do not).

    Raises MethodError for a source that predicts every token: it has no labels.
    """

    def __init__(self, source: Any, share: float, seed: int) -> None:
        at = getattr(source, "loss_at", None)
        if at is None or bool(np.asarray(at)[1:].all()):
            raise MethodError("labels can be corrupted where only some tokens are predicted", got="a source of all")
        self.source, self.loss_at = source, np.asarray(at, dtype=bool)
        self.n_sequences, self.sequence_length = source.n_sequences, source.sequence_length
        self._chosen = Permutation(self.n_sequences, key(seed, "corrupted"))
        self._below = round(share * self.n_sequences)
        self._donors = [Permutation(self.n_sequences, key(seed, "donor", number)) for number in range(_TRIES)]

    def __getattr__(self, name: str) -> Any:
        if name in ("words", "vocabulary"):
            return getattr(self.source, name)
        raise AttributeError(name)

    def tokens(self, index: int) -> NDArray[np.int64]:
        return self.batch(np.array([index]))[0]

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._both(np.asarray(indices, dtype=np.int64))[1]

    def corrupted(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n] whether the sequences with these numbers carry a wrong label."""
        own, shown = self._both(np.asarray(indices, dtype=np.int64))
        return (own != shown).any(axis=1)

    def _both(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        from headwater.dynamics.lab.sources import batch_of

        own = batch_of(self.source, indices)
        shown = own.copy()
        todo = np.flatnonzero(self._chosen(indices) < self._below)
        for donor in self._donors:
            if not len(todo):
                break
            labels = batch_of(self.source, donor(indices[todo]))[:, self.loss_at]
            shown[np.ix_(todo, np.flatnonzero(self.loss_at))] = labels
            todo = todo[(labels == own[todo][:, self.loss_at]).all(axis=1)]
        return own, shown
