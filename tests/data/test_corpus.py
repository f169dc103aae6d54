"""Corpora come back in training order, from files written here in their exact layouts."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from headwater.core.errors import HeadwaterError, MethodError, StoreError
from headwater.data import Corpus
from headwater.dynamics import train
from lab_runs import small


def write_megatron(prefix: Path, documents: list[list[int]], code: int = 8, kind: str = "<u2") -> None:
    """Megatron's two files, byte by byte."""
    body, places = b"", []
    for document in documents:
        places.append(len(body))
        body += np.array(document, dtype=kind).tobytes()
    Path(f"{prefix}.bin").write_bytes(body)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(documents)) + struct.pack("<Q", len(documents) + 1)
    index += b"".join(struct.pack("<i", len(document)) for document in documents)
    index += b"".join(struct.pack("<q", place) for place in places)
    index += b"".join(struct.pack("<q", number) for number in range(len(documents) + 1))
    Path(f"{prefix}.idx").write_bytes(index)


def neox_order(
    documents: list[list[int]], length: int, epochs: int, seed: int
) -> tuple[Any, Any, Any, list[list[int]]]:
    """The three arrays by walking through the documents token by token, and the samples that training would see."""
    random = np.random.RandomState(seed)
    order = np.array([d for _ in range(epochs) for d in range(len(documents))], dtype=np.int32)
    random.shuffle(order)
    walk = [(place, offset) for place, document in enumerate(order) for offset in range(len(documents[document]))]
    stream = [documents[order[place]][offset] for place, offset in walk]
    count = (len(stream) - 1) // length
    starts = np.array([walk[i * length] for i in range(count + 1)], dtype=np.int32)
    shuffled = np.arange(count, dtype=np.uint32)
    random.shuffle(shuffled)
    return order, starts, shuffled, [stream[i * length : i * length + length + 1] for i in shuffled]


def some_documents(seed: int = 0, n: int = 23) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 60000, size=size).tolist() for size in random.integers(1, 17, size=n)]


def test_pythias_preshuffled_rows_are_batches_in_order(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, 50000, size=(24, 2049)).tolist()
    write_megatron(tmp_path / "pile", rows)
    corpus = Corpus.open(tmp_path / "pile", batch=4)
    assert (corpus.steps, corpus.n_sequences, corpus.seen(3)) == (6, 24, 12)
    assert corpus.batch(2).tolist() == rows[8:12]
    assert Corpus.open(tmp_path / "pile.bin").between(5, 6).tolist() == rows[5:6]
    assert corpus.seen(1000) == 24


@pytest.mark.parametrize("how", ["arrays", "rebuilt"])
@pytest.mark.parametrize(("length", "samples"), [(8, 20), (3, 100), (50, 9)])
def test_megatron_order_is_that_of_training(tmp_path: Path, how: str, length: int, samples: int) -> None:
    documents = some_documents()
    total = sum(map(len, documents))
    epochs = next(e for e in range(1, 99) if (e * total - 1) // length >= samples)
    order, starts, shuffled, seen = neox_order(documents, length, epochs, seed=7)
    write_megatron(tmp_path / "text_document", documents)
    options: dict[str, Any] = {"sequence_length": length, "seed": 7, "samples": samples}
    if how == "arrays":
        name = f"{tmp_path}/text_document_train_indexmap_{samples}ns_{length}sl_7s"
        for array, kind in ((order, "doc_idx"), (starts, "sample_idx"), (shuffled, "shuffle_idx")):
            np.save(f"{name}_{kind}.npy", array)
        options = {"order": name}
    corpus = Corpus.open(tmp_path / "text_document", batch=2, **options)
    assert corpus.between(0, corpus.n_sequences).tolist() == seen
    assert corpus.batch(3).tolist() == seen[6:8]


def test_megatron_split_and_other_type(tmp_path: Path) -> None:
    documents = some_documents(3)
    write_megatron(tmp_path / "d", documents, code=4, kind="<i4")
    corpus = Corpus.open(tmp_path / "d.idx", sequence_length=4, seed=1, samples=6, documents=(2, 20))
    assert corpus.between(0, 6).tolist() == neox_order(documents[2:20], 4, 1, 1)[3][:6]


def test_broken_megatron_files_are_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "d", some_documents())
    index = (tmp_path / "d.idx").read_bytes()
    for broken in (b"", b"something else entirely, of some length", index[:60], index[:17] + b"\x07" + index[18:]):
        (tmp_path / "d.idx").write_bytes(broken)
        with pytest.raises(StoreError):
            Corpus.open(tmp_path / "d", layout="megatron")
    (tmp_path / "d.idx").write_bytes(index)
    with pytest.raises(MethodError, match="not preshuffled"):
        Corpus.open(tmp_path / "d")
    with pytest.raises(MethodError, match="all three"):
        Corpus.open(tmp_path / "d", seed=1)
    (tmp_path / "d.bin").write_bytes((tmp_path / "d.bin").read_bytes()[:-2])
    with pytest.raises(StoreError, match="does not hold"):
        Corpus.open(tmp_path / "d")


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
def test_olmo_order_is_that_of_training(tmp_path: Path, kind: str) -> None:
    random, length, size, seed = np.random.default_rng(2), 16, 6, 6198
    chunks, paths = [], []
    for number, tokens in enumerate((16 * 9 + 5, 16 * 11, 16 * 3 + 15)):  # what is left of a file fills no chunk
        ids = random.integers(0, 50000, size=tokens).astype(kind)
        paths.append(tmp_path / f"part-{number}.npy")
        paths[-1].write_bytes(ids.tobytes())  # flat, whatever the name says
        chunks += [ids[i * length : (i + 1) * length].tolist() for i in range(tokens // length)]
    corpus = Corpus.open(paths, sequence_length=length, batch=size, seed=seed, epochs=2, dtype=kind)
    seen: list[list[int]] = []
    for epoch in (0, 1):
        order = np.arange(len(chunks), dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(order)
        seen += [chunks[i] for i in order[: len(chunks) // size * size]]
    assert corpus.between(0, corpus.n_sequences).tolist() == seen
    assert corpus.batch(5).tolist() == seen[30:36]
    (tmp_path / "global_indices.npy").write_bytes(np.arange(12, dtype="<u4")[::-1].tobytes())
    given = Corpus.open(paths, sequence_length=length, indices=tmp_path / "global_indices.npy", dtype=kind)
    assert given.tokens(0).tolist() == chunks[11]


def test_a_run_of_the_lab_gives_its_exact_batches(tmp_path: Path) -> None:
    run = train(small(steps=5), tmp_path / "run")
    corpus = Corpus.open(tmp_path / "run")
    assert (corpus.steps, corpus.batch_size, corpus.seen(3)) == (5, 4, 12)
    for step in range(5):
        assert (corpus.batch(step) == run.order.step(step)).all()
    again = Corpus.open(run.order)
    assert again.identity() == corpus.identity()
    assert (again.between(0, 20) == np.concatenate([run.order.step(s) for s in range(5)])).all()
    with pytest.raises(MethodError, match="other batches"):
        Corpus.open(tmp_path / "run", batch=3)


def test_token_files(tmp_path: Path) -> None:
    ids = np.arange(40, dtype=np.uint16).reshape(8, 5)
    np.save(tmp_path / "a.npy", ids)
    ids.tofile(tmp_path / "b.bin")
    (tmp_path / "b.json").write_text(json.dumps({"dtype": "uint16", "sequence_length": 5}))
    for name in ("a.npy", "b.bin"):
        corpus = Corpus.open(tmp_path / name, batch=3)
        assert corpus.batch(1).tolist() == ids[3:6].tolist()
        assert corpus.steps == 2
    both = Corpus.open([tmp_path / "a.npy", tmp_path / "b.bin"], layout="tokens")
    assert both.between(6, 10).tolist() == np.concatenate([ids, ids])[6:10].tolist()
    pieces = list(both.pieces({"sequence": 3}, size=10))
    assert [first for first, _, _ in pieces] == [3, 5, 7, 9, 11, 13, 15]
    assert np.concatenate([rows for _, rows, _ in pieces]).tolist() == both.between(3, 16).tolist()
    with pytest.raises(MethodError, match="flat"):
        (tmp_path / "b.json").unlink()
        Corpus.open(tmp_path / "b.bin", dtype="uint16")


TEXTS = ["One document.", "  Two,\nof lines. ", "Drei – süß", "four"]


def write_texts(folder: Path) -> dict[str, Path]:
    rows = [*TEXTS[:2], "", *TEXTS[2:]]
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows) + "\n\n")
    pl.DataFrame({"id": range(5), "text": rows}).write_parquet(folder / "t.parquet", row_group_size=2)
    (folder / "t.txt").write_text("\n\n\n".join(TEXTS))
    return {name: folder / f"t.{name}" for name in ("jsonl", "parquet", "txt")}


@pytest.mark.parametrize("name", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("size", [1, 20, 1000])
def test_documents_in_order_and_from_any_place_on(tmp_path: Path, name: str, size: int) -> None:
    path = write_texts(tmp_path)[name]
    options = {"documents": "paragraphs"} if name == "txt" else {}
    corpus = Corpus.open([path, path], batch=3, **options)
    pieces = list(corpus.pieces(size=size))
    assert [text for _, texts, _ in pieces for text in texts] == TEXTS * 2
    for number, (first, texts, cursor) in enumerate(pieces):
        assert first == sum(len(before) for _, before, _ in pieces[:number])
        rest = [text for _, more, _ in corpus.pieces(cursor, size=size) for text in more]
        assert rest == (TEXTS * 2)[first + len(texts) :]
    assert corpus.n_sequences == 8
    assert corpus.batch(1) == (TEXTS * 2)[3:6]


def test_unreadable_texts_say_where(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(StoreError, match="holds no text"):
        _ = Corpus.open(tmp_path / "a.jsonl").n_sequences
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt')
    with pytest.raises(StoreError, match="not JSON"):
        _ = Corpus.open(tmp_path / "a.jsonl").n_sequences
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(StoreError, match="not UTF-8"):
        _ = Corpus.open(tmp_path / "a.txt").n_sequences
    with pytest.raises(StoreError, match="no column"):
        _ = Corpus.open(write_texts(tmp_path)["parquet"], column="txt").n_sequences


@pytest.mark.parametrize(
    ("name", "options"),
    [("nothing.jsonl.zst", {}), ("t.jsonl", {"colum": "text"}), ("t.jsonl", {"layout": "texts"}),
     ("t.jsonl", {"batch": 0}), ("t.jsonl", {"documents": "words"})],
)  # fmt: skip
def test_wrong_settings_are_refused(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    write_texts(tmp_path)
    with pytest.raises(HeadwaterError):
        Corpus.open(tmp_path / name, **options)
