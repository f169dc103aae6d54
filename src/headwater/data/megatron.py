"""Token ids in Megatron's indexed layout, in the order in which GPT-NeoX draws samples: what Pythia was trained on.

`<prefix>.bin` holds the ids of all documents, `<prefix>.idx` their sizes and places. Three more arrays give the order:
`doc_idx` (documents, shuffled, over all epochs), `sample_idx` (document and offset at which each sample begins) and
`shuffle_idx` (which sample is the k-th). Pythia's preshuffled files hold each sample as a document, in order.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError
from headwater.core.files import store_error
from headwater.data.corpus import TokenCorpus, batch_of, map_npy, map_raw

_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_ORDER = ("doc_idx", "sample_idx", "shuffle_idx")


class Megatron(TokenCorpus):
    """An indexed dataset in training order.

    prefix: of the files, or one of them. order: the prefix of the three arrays (`..._doc_idx.npy`,
    `..._sample_idx.npy`, `..._shuffle_idx.npy`), or `{name: file}`. Without them, either every document is a sample and
    they come in order (preshuffled), or `sequence_length` (tokens a sample predicts; it has one more), `seed` and
    `samples` (how many the run asked for) rebuild the three as GPT-NeoX does. documents: (first, last) of the split;
    all where not given.

    Known failure: a rebuilt order is that of GPT-NeoX's packed samples from one dataset; blends of several, and samples
    packed without chopping, need their own arrays.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        batch: int | None = None,
        order: Any = None,
        sequence_length: int | None = None,
        seed: int | None = None,
        samples: int | None = None,
        documents: tuple[int, int] | None = None,
    ) -> None:
        prefix = prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix
        self.name, self.batch_size = str(prefix), batch_of(batch)
        ids, self.sizes, self.places = read_index(Path(f"{prefix}.idx"))
        self._ids = map_raw(Path(f"{prefix}.bin"), ids)
        ends = self.places // ids.itemsize + self.sizes
        if len(self.sizes) == 0 or int(ends.max()) > len(self._ids):
            raise StoreError(f"{prefix}.bin does not hold what its index says", got=f"{len(self._ids)} token ids")
        self._first = self.places // ids.itemsize
        rebuilt = (seed, samples) != (None, None)
        if order is not None:
            if rebuilt or documents is not None:
                raise MethodError("give an order, or what to rebuild it from, not both")
            arrays = [map_npy(path) for path in _order_files(order)]
        elif rebuilt:
            if seed is None or samples is None or sequence_length is None:
                raise MethodError(
                    "cannot rebuild the order",
                    got=f"seed={seed}, samples={samples}, sequence_length={sequence_length}",
                    wanted="all three",
                )
            first, last = documents or (0, len(self.sizes))
            arrays = list(build_order(self.sizes, np.arange(first, last), sequence_length, seed, samples))
        else:
            lengths = np.unique(self.sizes)
            if len(lengths) != 1 or documents is not None:
                raise MethodError(
                    f"{prefix} is not preshuffled: its documents differ in length",
                    got=f"{int(lengths[0])} to {int(lengths[-1])} tokens",
                    fix="Give order=, or sequence_length=, seed= and samples=",
                )
            self._order, self.sequence_length, self._n = None, int(lengths[0]), len(self.sizes)
            self._check_length(sequence_length)
            return
        self._order = arrays
        self._n = len(arrays[2])
        if arrays[1].ndim != 2 or arrays[1].shape[1] != 2 or len(arrays[1]) <= int(arrays[2].max()) + 1:
            raise StoreError("the arrays of the order do not fit one another", got=f"sample_idx {arrays[1].shape}")
        self.sequence_length = len(self._sample(0))
        if sequence_length is not None and self.sequence_length != sequence_length + 1:
            raise MethodError("the order is of samples of another length", got=sequence_length + 1)

    def _check_length(self, said: int | None) -> None:
        if said is not None and said not in (self.sequence_length, self.sequence_length - 1):
            raise MethodError(f"{self.name} has sequences of another length", got=said, wanted=self.sequence_length)

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        if self._order is None:
            return self._ids[self._first[numbers][:, None] + np.arange(self.sequence_length)]
        if not len(numbers):
            return np.empty((0, self.sequence_length), dtype=self._ids.dtype)
        return np.stack([self._sample(int(number)) for number in numbers])

    def _sample(self, number: int) -> NDArray[Any]:
        documents, starts, shuffled = self._order  # type: ignore[misc]
        sample = int(shuffled[number])
        (first, begin), (last, end) = starts[sample].tolist(), starts[sample + 1].tolist()
        parts: list[NDArray[Any]] = []
        for place in range(first, last + 1):  # the last token of a sample is the first of the next
            document = int(documents[place])
            start, size = int(self._first[document]), int(self.sizes[document])
            parts.append(
                self._ids[start + (begin if place == first else 0) : start + (end + 1 if place == last else size)]
            )
        return np.concatenate(parts)


def read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int64], NDArray[np.int64]]:
    """(type of the ids, sizes in tokens, places in bytes) of the documents in an `.idx` file. Raises StoreError."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC) + 8 + 1 + 8 + 8)
            if len(head) < len(_MAGIC) + 25 or not head.startswith(_MAGIC):
                raise StoreError(
                    f"{path} is no index of an MMapIndexedDataset", got=repr(head[:9]), wanted=repr(_MAGIC)
                )
            version, code, count, _ = struct.unpack("<QBQQ", head[len(_MAGIC) :])
            if version != 1 or code not in _CODES:
                raise StoreError(
                    f"{path} is of a kind that is not read", got=f"version {version}, type {code}",
                    wanted=f"version 1, type {', '.join(map(str, _CODES))}",
                )  # fmt: skip
            rest = file.read(count * 12)
    except OSError as error:
        raise store_error(error, path, "read") from error
    if len(rest) != count * 12:
        raise StoreError(f"{path} is cut off", got=f"{len(rest)} bytes", wanted=f"{count} documents")
    sizes = np.frombuffer(rest, dtype="<i4", count=count).astype(np.int64)
    places = np.frombuffer(rest, dtype="<i8", count=count, offset=4 * count).astype(np.int64)
    return np.dtype(_CODES[code]).newbyteorder("<"), sizes, places


def build_order(
    sizes: NDArray[np.int64], documents: NDArray[Any], sequence_length: int, seed: int, samples: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """doc_idx, sample_idx, shuffle_idx as GPT-NeoX builds them (packed): shuffled documents of as many epochs as are
    needed, cut every `sequence_length` tokens (samples share a token), then the samples shuffled."""
    total = int(sizes[documents].sum())
    if total < 1 or samples < 1 or sequence_length < 1:
        raise MethodError("nothing to draw samples from", got=f"{total} tokens, {samples} samples")
    epochs = 1
    while (epochs * total - 1) // sequence_length < samples:
        epochs += 1
    random = np.random.RandomState(seed=seed)
    order = np.tile(documents, epochs).astype(np.int32)
    random.shuffle(order)
    ends = np.cumsum(sizes[order])
    starts = np.arange((epochs * total - 1) // sequence_length + 1, dtype=np.int64) * sequence_length
    place = np.searchsorted(ends, starts, side="right")
    offset = starts - (ends[place] - sizes[order[place]])
    shuffled = np.arange(len(starts) - 1, dtype=np.int64)
    random.shuffle(shuffled)
    return order, np.stack([place, offset], axis=1), shuffled


def _order_files(order: Any) -> list[Path]:
    if isinstance(order, dict):
        missing = [name for name in _ORDER if name not in order]
        if missing:
            raise MethodError("the order lacks arrays", got=missing, wanted=", ".join(_ORDER))
        return [Path(order[name]) for name in _ORDER]
    return [Path(f"{order}_{name}.npy") for name in _ORDER]
