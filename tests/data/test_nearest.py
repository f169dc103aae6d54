"""Nearest sequences against all cosines, and memorized text against decoding it."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from headwater.core.errors import HeadwaterError
from headwater.core.results import load_result
from headwater.data import Corpus, memorized, nearest
from headwater.data.memorization import matched
from headwater.dynamics import TrainConfig, TrainingRun, train


def all_cosines(model: Any, rows: Any, query: Any, site: str, center: bool) -> np.ndarray[Any, Any]:
    mean = lambda ids: model.run(torch.as_tensor(ids)[None], capture=(site,))[site].double().mean(dim=1)[0].numpy()  # noqa: E731
    held = np.stack([mean(row) for row in rows])
    middle = held.mean(axis=0) if center else 0.0
    a, b = held - middle, mean(query) - middle
    return a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("site", ["embed", "resid_post.1"])
def test_the_nearest_are_those_of_all(tiny_model64: Any, center: bool, site: str) -> None:
    rows = np.random.default_rng(0).integers(0, 200, (70, 9))
    queries = [rows[3].tolist(), [5, 6, 7]]
    found = nearest(tiny_model64, queries, Rows(rows), k=5, site=site, center=center, batch=16)
    for query, ids in enumerate(queries):
        cosines = all_cosines(tiny_model64, rows, ids, site, center)
        mine = found.tables["nearest"].filter(pl.col("query") == query)
        assert mine["sequence"].to_list() == np.argsort(-cosines)[:5].tolist()
        np.testing.assert_allclose(mine["cosine"].to_numpy(), np.sort(cosines)[::-1][:5], rtol=1e-6)
        about = found.tables["queries"].row(query, named=True)
        assert about["mean"] == pytest.approx(cosines.mean(), abs=1e-7)
        assert about["sd"] == pytest.approx(cosines.std(), abs=1e-7)
    assert found.tables["nearest"]["sequence"][0] == 3
    assert found.tables["nearest"]["cosine"][0] == pytest.approx(1.0)


def test_one_row_of_ids_is_one_query(tiny_model64: Any) -> None:
    rows = np.random.default_rng(0).integers(0, 200, (20, 9))
    whole = nearest(tiny_model64, [rows[3].tolist()], Rows(rows), k=2)
    for one in (rows[3].tolist(), rows[3], torch.from_numpy(rows[3]), rows[3:4]):
        assert nearest(tiny_model64, one, Rows(rows), k=2).content_hash == whole.content_hash


class Rows:
    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.n_sequences, self.sequence_length = rows.shape

    def tokens(self, index: int) -> Any:
        return self.rows[index]


def test_nearest_refuses(tiny_model: Any, tmp_path: Path) -> None:
    rows = Rows(np.ones((4, 3), dtype=np.int64))
    for options, said in [
        ({"k": 9}, "fewer"),
        ({"kk": 1}, "unknown option"),
        ({"k": 2, "site": "logits"}, "stream|site"),
    ]:
        with pytest.raises(HeadwaterError, match=said):
            nearest(tiny_model, "a text", rows, **options)
    for nobody in ([], np.ones((0, 3), dtype=np.int64)):
        with pytest.raises(HeadwaterError, match="nothing is asked"):
            nearest(tiny_model, nobody, rows, k=1)
    with pytest.raises(HeadwaterError, match="no tokens"):
        nearest(tiny_model, [[]], rows, k=1)
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(HeadwaterError, match="holds texts"):
        nearest(tiny_model, "a", tmp_path / "t.txt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """Random tokens, which can only be memorized: six sequences again and again, and some hundred once."""
    folder = tmp_path_factory.mktemp("memorized")
    np.save(folder / "rows.npy", np.random.default_rng(0).integers(0, 20, (3000, 12)))
    settings = {
        "model": {"d_model": 32, "n_heads": 2}, "vocabulary": 20, "steps": 150, "batch": 16, "threads": 1,
        "data": [{"source": str(folder / "rows.npy"), "repeat": {"share": 0.6, "sequences": 6}}],
        "optimizer": {"lr": 0.01}, "checkpoints": {"log": False},
    }  # fmt: skip
    return train(TrainConfig.from_dict(settings), folder / "run")


def test_what_was_seen_often_is_given_back(run: TrainingRun, tmp_path: Path) -> None:
    model = run.load()
    held = Rows(np.random.default_rng(9).integers(0, 20, (300, 12)))
    found = memorized(model, run.order, held, prompt=4, continuation=8, sequences=300)
    table = found.tables["repeats"]
    assert table["seen_from"][0] == 0 and table["seen_to"][0] == 0 and table["n"][0] == 300
    assert found.facts["held_share"] == 0.0
    often = table.filter(pl.col("seen_from") > 100)
    assert often["n"].sum() >= 1 and often["share"].min() > 0.9
    once = table.filter(pl.col("seen_to") == 1)
    assert once["share"][0] < 0.05
    rows = found.tables["sequences"].filter(~pl.col("held"))
    counts = {bytes(run.order.tokens(k).tobytes()): 0 for k in range(run.order.n_sequences)}
    for k in range(run.order.n_sequences):
        counts[run.order.tokens(k).tobytes()] += 1
    for row in rows.head(20).iter_rows(named=True):
        assert row["seen"] == counts[run.order.tokens(row["sequence"]).tobytes()]
    assert load_result(found.save(tmp_path / "kept")).content_hash == found.content_hash


def test_one_pass_tells_what_decoding_would_give(run: TrainingRun) -> None:
    model = run.load()
    places = run.data.places(np.arange(200))[1]
    often = int(np.bincount(places).argmax())
    ids = np.stack([run.data.sources[0].tokens(often), *(run.order.tokens(k) for k in range(7))]).astype(np.int64)
    told = matched(model, ids, 4)
    for row, n in zip(ids, told, strict=True):
        made = row[:4].tolist()
        for _ in range(8):
            made.append(int(model.hf(input_ids=torch.tensor([made])).logits[0, -1].argmax()))
        made = made[4:]
        same = next((i for i, (a, b) in enumerate(zip(made, row[4:].tolist(), strict=True)) if a != b), 8)
        assert n == same
    assert told[0] == 8


def test_memorized_refuses(run: TrainingRun) -> None:
    model = run.load()
    held = Rows(np.zeros((5, 12), dtype=np.int64))
    for options, said in [({"prompt": 0}, "above 0"), ({"prompt": 9}, "too short"), ({"promt": 4}, "prompt")]:
        with pytest.raises(HeadwaterError, match=said):
            memorized(model, run.order, held, **{"continuation": 8} | options)
    for trained, others in ((Rows(np.zeros((0, 12), dtype=np.int64)), held), (run.order, Rows(np.zeros((0, 12))))):
        with pytest.raises(HeadwaterError, match="no sequences"):
            memorized(model, trained, others, prompt=4, continuation=8)
    with pytest.raises(HeadwaterError, match="stand in the training data"):
        memorized(model, run.order, Corpus.open(run.order), prompt=4, continuation=8, sequences=20)
