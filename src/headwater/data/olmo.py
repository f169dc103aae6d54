"""Token ids in OLMo's layout: flat files of uint16 or uint32, cut into chunks, drawn in a global shuffled order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError
from headwater.data.corpus import TokenCorpus, batch_of, check_dtype, gather, map_raw


class Olmo(TokenCorpus):
    """OLMo's memory-mapped files in training order.

    paths: the files in the order of the run's config (the order of the data depends on it). Each is cut into chunks of
    `sequence_length` ids; what is left of it is not used. In epoch e (from 0) the chunks of all files are shuffled by
    numpy's `Generator(PCG64(seed + e))`; only whole batches of an epoch are taken. indices: a file of the global order
    that a run wrote (flat uint32), in place of the shuffle.

    Known failure: runs of OLMo-core (OLMo-2 and later) mix sources and shuffle by other rules; give their indices.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        sequence_length: int = 2048,
        batch: int | None = None,
        seed: int = 0,
        epochs: int = 1,
        dtype: str = "uint16",
        shuffle: bool = True,
        indices: str | Path | None = None,
    ) -> None:
        if sequence_length < 1 or epochs < 1:
            raise MethodError("a corpus has chunks and epochs", got=f"{sequence_length} tokens, {epochs} epochs")
        self.name, self.batch_size, self.sequence_length = str(paths[0]), batch_of(batch), sequence_length
        kind = np.dtype(check_dtype(dtype)).newbyteorder("<")
        flat = [map_raw(path, kind) for path in paths]
        self._parts = [
            ids[: len(ids) // sequence_length * sequence_length].reshape(-1, sequence_length) for ids in flat
        ]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self.n_chunks = int(self._starts[-1])
        size = self.batch_size or 1
        self._seed, self._shuffle, self._orders = seed, shuffle, dict[int, NDArray[Any]]()
        if indices is not None:
            if epochs != 1:
                raise MethodError("indices are those of one epoch", got=f"epochs={epochs}")
            order = map_raw(Path(indices), np.dtype("<u4"))
            if len(order) == 0 or int(order.max()) >= self.n_chunks:
                raise StoreError(f"{indices} is not the order of these files", wanted=f"numbers below {self.n_chunks}")
            self._orders[0] = order
        self._epoch = (len(self._orders[0]) if indices is not None else self.n_chunks) // size * size
        self._n = self._epoch * epochs
        if self._n == 0:
            raise StoreError("too few tokens for one batch", got=f"{self.n_chunks} chunks", wanted=f"{size}")

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        return gather(self._parts, self._starts, self.chunks(numbers))

    def chunks(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which chunk (counted over all files) each of these sequences is."""
        epoch, within = numbers // self._epoch, numbers % self._epoch
        out = np.empty(len(numbers), dtype=np.int64)
        for one in np.unique(epoch).tolist():
            mine = epoch == one
            out[mine] = self._order(one)[within[mine]]
        return out

    def _order(self, epoch: int) -> NDArray[Any]:
        if epoch not in self._orders:
            order = np.arange(self.n_chunks, dtype=np.uint32)
            if self._shuffle:
                np.random.Generator(np.random.PCG64(seed=self._seed + epoch)).shuffle(order)
            if len(self._orders) > 2:
                self._orders.clear()
            self._orders[epoch] = order
        return self._orders[epoch]
