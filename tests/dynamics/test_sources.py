"""Where training sequences come from."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from headwater.core.errors import HeadwaterError, MethodError, StoreError
from headwater.dynamics.lab.config import TrainConfig
from headwater.dynamics.lab.corpus import Trained, assemble
from headwater.dynamics.lab.generators import induction, modular_addition, moving_sum
from headwater.dynamics.lab.sources import batch_of, read_array, read_texts, sources
from headwater.dynamics.lab.words import vocabulary_of, word_tokenizer


def config(**options: object) -> TrainConfig:
    return TrainConfig.from_dict({"batch": 4, "steps": 10, **options})


def test_induction_repeats_distinct_tokens() -> None:
    source = induction(vocabulary=20, length=24, seed=1)
    for index in range(20):
        row = source.tokens(index)
        period = next(p for p in range(1, 24) if np.array_equal(row[p:], row[:-p]))
        assert 6 <= period <= 12 and len(set(row[:period].tolist())) == period
    assert np.array_equal(source.tokens(7), induction(vocabulary=20, length=24, seed=1).tokens(7))
    assert not np.array_equal(source.tokens(7), induction(vocabulary=20, length=24, seed=2).tokens(7))
    assert np.array_equal(source.batch(np.array([3, 3, 5])), np.stack([source.tokens(i) for i in (3, 3, 5)]))
    fixed = induction(vocabulary=20, length=12, period=4)
    assert np.array_equal(fixed.tokens(0)[:4], fixed.tokens(0)[4:8])
    with pytest.raises(MethodError, match="period"):
        induction(vocabulary=5, length=48)


def test_modular_addition_splits_mirrored_pairs_together() -> None:
    train, test = (modular_addition(p=11, share=0.4, split=side, seed=3) for side in ("train", "test"))
    rows = {side: source.batch(np.arange(source.n_sequences)) for side, source in (("train", train), ("test", test))}
    for a, b, sign, c in np.concatenate(list(rows.values())).tolist():
        assert sign == 11 and c == (a + b) % 11
    pairs = {side: {tuple(row[:2]) for row in found.tolist()} for side, found in rows.items()}
    assert not pairs["train"] & pairs["test"] and len(pairs["train"] | pairs["test"]) == 121
    assert all((b, a) in found for found in pairs.values() for a, b in found)
    assert train.loss_at is not None and train.loss_at.tolist() == [False, False, False, True]
    assert train.words[11] == "="


def test_moving_sum_is_what_it_says() -> None:
    source = moving_sum(p=7, length=6, window=3, seed=0)
    row = source.tokens(4)
    x, y = row[:6], row[7:]
    assert row[6] == 7
    assert y.tolist() == [int(x[max(0, i - 2) : i + 1].sum()) % 7 for i in range(6)]


def test_unknown_names_and_options_are_told() -> None:
    with pytest.raises(MethodError, match="induction"):
        sources.get("inductoin")
    with pytest.raises(MethodError, match="do not fit"):
        assemble(config(data=[{"source": "induction", "options": {"vocab": 3}}]), None)


def test_arrays_are_mapped_and_never_unpickled(tmp_path: Path) -> None:
    ids = np.arange(60).reshape(10, 6)
    np.save(tmp_path / "a.npy", ids.astype(np.uint16))
    source = read_array(tmp_path / "a.npy", None)
    assert (source.n_sequences, source.sequence_length) == (10, 6)
    assert np.array_equal(batch_of(source, np.array([9, 0])), ids[[9, 0]])
    ids.ravel()[:59].astype(np.uint32).tofile(tmp_path / "b.bin")
    flat = read_array(tmp_path / "b.bin", 8, dtype="uint32")
    assert flat.n_sequences == 7 and flat.tokens(6).tolist() == list(range(48, 56))  # the rest is left out
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="cannot read token ids"):
        read_array(tmp_path / "evil.npy", 4)
    np.save(tmp_path / "float.npy", np.ones((3, 3)))
    for name, wrong in (("float.npy", "no token ids"), ("b.bin", "no sequences"), ("none.npy", "No such file")):
        with pytest.raises(HeadwaterError, match=wrong):
            read_array(tmp_path / name, None)


def test_texts_come_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n\nthree\nfour\n")
    assert list(read_texts(tmp_path / "a.txt")) == ["one two", "three", "four"]
    assert list(read_texts(tmp_path / "a.txt", documents="paragraphs")) == ["one two", "three\nfour"]
    assert list(read_texts(tmp_path / "a.txt", documents="file")) == ["one two\n\nthree\nfour"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y", "z": 1}\n')
    assert list(read_texts(tmp_path / "b.jsonl")) == ["x", "y"]
    pl.DataFrame({"body": ["p", None, "q"]}).write_parquet(tmp_path / "c.parquet")
    assert list(read_texts(tmp_path / "c.parquet", column="body")) == ["p", "q"]
    with pytest.raises(StoreError, match="no column"):
        list(read_texts(tmp_path / "c.parquet"))
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\nnot json\n')
    with pytest.raises(StoreError, match="line 2"):
        list(read_texts(tmp_path / "d.jsonl"))


def test_a_text_becomes_sequences_and_is_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"the w{i} sat , on w{i % 3} ." for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = config(data=[{"source": str(tmp_path / "a.jsonl")}], tokenizer="words", sequence_length=9)
    data = assemble(settings, tmp_path / "data")
    assert data.tokenizer is not None and data.vocabulary == len(data.tokenizer)
    ids = data.tokenizer(texts)["input_ids"]
    flat = [token for row in ids for token in (*row, data.tokenizer.eos_token_id)]
    assert data.sources[0].n_sequences == len(flat) // 9
    got = batch_of(data.sources[0], np.arange(data.sources[0].n_sequences)).ravel().tolist()
    assert got == flat[: len(got)]
    assert data.tokenizer.decode(ids[4]) == "the w4 sat , on w1 ."
    from headwater.dynamics.lab import corpus

    monkeypatch.setattr(corpus, "_encoded", lambda *arguments: pytest.fail("tokenized again"))
    again = assemble(settings, tmp_path / "data")
    assert again.fingerprint == data.fingerprint
    in_memory = settings  # without a folder nothing is kept, and the tokens are the same
    monkeypatch.undo()
    assert assemble(in_memory, None).fingerprint == data.fingerprint


def test_a_vocabulary_is_commonest_first() -> None:
    words = vocabulary_of(["b a, a", "c a b"])
    assert words == ["<unk>", "<eos>", "a", "b", ",", "c"]
    assert vocabulary_of(["b a a"], 3) == ["<unk>", "<eos>", "a"]
    tokenizer = word_tokenizer(words)
    assert tokenizer("a, zebra b")["input_ids"] == [2, 4, 0, 3]
    with pytest.raises(MethodError, match="each once"):
        word_tokenizer(["a", "a"])


def test_sources_must_fit_together() -> None:
    two = [{"source": "induction", "options": {"length": length, "vocabulary": 30}} for length in (24, 20)]
    with pytest.raises(MethodError, match="differ in the length"):
        assemble(config(data=two), None)
    two = [{"source": "induction", "options": {"length": 8, "vocabulary": size}} for size in (20, 21)]
    with pytest.raises(MethodError, match="differ in their words"):
        assemble(config(data=two), None)
    with pytest.raises(MethodError, match="leaves nothing else"):
        one = {"source": "induction", "options": {"sequences": 5}, "repeat": {"share": 0.5, "sequences": 5}}
        assemble(config(data=[one]), None)


def test_what_was_seen_is_rebuilt_from_the_config_alone() -> None:
    settings = config(
        seed=9,
        data=[
            {
                "source": "induction",
                "weight": 3,
                "options": {"vocabulary": 16, "length": 12, "period": 5, "sequences": 40},
            },
            {
                "source": "induction",
                "options": {"vocabulary": 16, "length": 12, "period": 3, "sequences": 9, "seed": 1},
            },
        ],
    )
    order = Trained(assemble(settings, None), batch=settings.batch, steps=settings.steps)
    steps = np.concatenate([order.step(step) for step in range(10)])
    assert np.array_equal(steps, np.stack([order.tokens(k) for k in range(order.n_sequences)]))
    assert np.array_equal(order.batch(np.array([39, 0])), steps[[39, 0]])
    assert order.seen(3) == 12
    with pytest.raises(MethodError, match="0 to 9"):
        order.step(10)
    third = sum(np.array_equal(row[3:], row[:-3]) for row in steps)
    assert 2 <= third <= 20  # both sources are in it, a quarter of the second


def test_induction_of_what_the_repetition_tells() -> None:
    source = induction(vocabulary=20, length=12, period=5, repeats_only=True)
    assert source.loss_at is not None and np.flatnonzero(source.loss_at).tolist() == [6, 7, 8, 9, 10, 11]
    row = source.tokens(3).tolist()
    for i in range(6, 12):  # the token before stood once already, and what came after it comes again
        assert row[row.index(row[i - 1]) + 1] == row[i]
    for options in ({}, {"period": 11}):
        with pytest.raises(MethodError, match="period that comes again"):
            induction(vocabulary=20, length=12, repeats_only=True, **options)
