"""The suffix array against counting by hand; the service's client against its documented answers."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.cli import main
from headwater.core.errors import HeadwaterError
from headwater.data import Corpus, NgramIndex
from headwater.data.ngram_service import NgramService


def index_of(rows: np.ndarray[Any, Any], folder: Path) -> NgramIndex:
    np.save(folder / "rows.npy", rows)
    return NgramIndex.build(Corpus.open(folder / "rows.npy"))


def by_hand(rows: np.ndarray[Any, Any], ngram: list[int]) -> list[tuple[int, int]]:
    n = len(ngram)
    length = rows.shape[1]
    return [(i, j) for i, row in enumerate(rows.tolist()) for j in range(length - n + 1) if row[j : j + n] == ngram]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_places_and_what_follows_are_those_by_hand(data: st.DataObject) -> None:
    import tempfile

    highest = data.draw(st.sampled_from([1, 3, 300, 70_000]))
    few = data.draw(st.lists(st.integers(0, highest), min_size=1, max_size=3))
    n, length = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 7))
    rows = np.array(
        data.draw(st.lists(st.lists(st.sampled_from(few), min_size=length, max_size=length), min_size=n, max_size=n))
    )
    with tempfile.TemporaryDirectory() as folder:
        index = index_of(rows, Path(folder))
    ngram = data.draw(st.lists(st.sampled_from([*few, 5]), min_size=1, max_size=4))
    places = by_hand(rows, ngram)
    assert index.count(ngram) == len(places)
    assert index.find(ngram, limit=10_000) == places
    longest = next(k for k in range(len(ngram), -1, -1) if k == 0 or by_hand(rows, ngram[-k:]))
    assert index.longest(ngram)[0] == longest
    after = Counter(int(rows[i, j + len(ngram)]) for i, j in places if j + len(ngram) < length)
    found = index.next(ngram, backoff=False)
    assert dict(zip(found.tokens.tolist(), found.counts.tolist(), strict=True)) == after
    assert found.total == len(places)
    text = data.draw(st.lists(st.sampled_from([*few, 5]), min_size=1, max_size=8))
    expected = [
        next(k for k in range(len(text) - i, -1, -1) if k == 0 or by_hand(rows, text[i : i + k]))
        for i in range(len(text))
    ]
    assert index.matches(text).tolist() == expected


def test_it_backs_off_to_what_something_follows(tmp_path: Path) -> None:
    index = index_of(np.array([[1, 2, 3], [4, 2, 5], [6, 7, 8], [9, 1, 2]]), tmp_path)
    found = index.next([1, 2])
    assert (found.used, found.total, found.tokens.tolist()) == (2, 2, [3])  # once it ends a sequence
    assert index.next([9, 9, 2]).tokens.tolist() == [3, 5] and index.next([9, 9, 2]).used == 1
    last = index.next([8])  # stands only at an end: nothing follows it
    assert last.used == 0 and last.total == 12 and last.counts.sum() == 12
    assert last.tokens[0] == 2 and last.shares[0] == pytest.approx(3 / 12)
    assert index.next([77], backoff=False).total == 0 and not len(index.next([77], backoff=False).tokens)
    assert index.longest([3, 1, 2]) == (2, 2) and index.longest([77]) == (0, 12)


def test_it_is_kept_and_opened(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 9, (50, 20))
    index = index_of(rows, tmp_path)
    opened = NgramIndex.open(index.save(tmp_path / "index"))
    for ngram in ([3], [3, 4], [1, 2, 3]):
        assert opened.count(ngram) == index.count(ngram) == len(by_hand(rows, ngram))
    assert isinstance(opened._tokens, np.memmap)
    np.save(tmp_path / "index" / "tokens.npy", np.zeros(3, dtype=np.uint16))
    with pytest.raises(HeadwaterError, match="damaged"):
        NgramIndex.open(tmp_path / "index")
    with pytest.raises(HeadwaterError, match="missing"):
        NgramIndex.open(tmp_path)
    (tmp_path / "t.txt").write_text("a text\n")
    with pytest.raises(HeadwaterError, match="holds texts"):
        NgramIndex.build(tmp_path / "t.txt")
    with pytest.raises(HeadwaterError, match="negative"):
        index.count([-1])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.array([[1, 2, 3, 1, 2], [4, 1, 2, 3, 9]])
    np.save(tmp_path / "rows.npy", rows)
    build = ["ngrams", str(tmp_path / "rows.npy"), "--out", str(tmp_path / "index"), "--ids", "1 2", "--json"]
    with pytest.raises(SystemExit) as left:
        main(build)
    told = json.loads(capsys.readouterr().out)
    assert left.value.code == 0 and told["count"] == 3
    assert told["next"] == [{"token": 3, "count": 2, "share": 1.0}]
    with pytest.raises(SystemExit) as left:
        main(["ngrams", str(tmp_path / "index"), "--ids", "2 3 1"])
    assert left.value.code == 0 and "stands 1 times" in capsys.readouterr().out
    for wrong in (["--ids", "a"], [], ["--text", "a"], ["--ids", " "]):
        with pytest.raises(SystemExit) as left:
            main(["ngrams", str(tmp_path / "index"), *wrong])
        assert left.value.code == 2


# What the service's own pages show (count), and what its package declares (the others).
ANSWERS = {
    "count": {"count": 2349754, "approx": False, "latency": 0.724, "token_ids": [3014, 310, 7660],
              "tokens": ["▁University", "▁of", "▁Washington"]},
    "infgram_prob": {"prompt_cnt": 4, "cont_cnt": 3, "prob": 0.75, "suffix_len": 2, "latency": 1.0},
    "prob": {"prompt_cnt": 0, "cont_cnt": 0, "prob": -1.0, "latency": 1.0},
    "infgram_ntd": {"prompt_cnt": 4, "approx": False, "suffix_len": 2, "result_by_token_id": {
        "7660": {"token": "▁Washington", "cont_cnt": 3, "prob": 0.75},
        "8046": {"token": "▁California", "cont_cnt": 1, "prob": 0.25}}},
    "ntd": {"count": 1},
}  # fmt: skip


@pytest.fixture
def service() -> Iterator[tuple[NgramService, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            one = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(one)
            bodies = {
                "broken": b"<html>", "list": b"[]", "wrong": b'{"error": "no such index"}', "odd": b'{"count": null}',
                "halves": b'{"count": "\xff"}', "words": b'{"prob": "much"}', "cut": b"{",
            }  # fmt: skip
            body = bodies.get(one["index"], json.dumps(ANSWERS[one["query_type"]]).encode())
            self.send_response(503 if one["index"] == "busy" else 200)
            if one["index"] == "cut":
                self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield NgramService("v4_rpj_llama_s4", url=f"http://127.0.0.1:{server.server_port}/"), asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_service_is_asked_and_understood(service: tuple[NgramService, list[dict[str, Any]]]) -> None:
    client, asked = service
    assert client.count("University of Washington") == 2349754
    assert asked[0] == {"index": "v4_rpj_llama_s4", "query_type": "count", "query": "University of Washington"}
    assert client.probability([3014, 310, 7660]) == 0.75
    assert asked[1] == {"index": "v4_rpj_llama_s4", "query_type": "infgram_prob", "query_ids": [3014, 310, 7660]}
    assert client.probability("nowhere to be found", backoff=False) is None
    assert client.next("University of") == {7660: ("▁Washington", 0.75), 8046: ("▁California", 0.25)}
    with pytest.raises(HeadwaterError, match="no answer that is known"):
        client.next("University of", backoff=False)
    for index, said in (
        ("wrong", "no such index"), ("broken", "known"), ("list", "known"), ("busy", "HTTP 503"), ("odd", "known"),
        ("halves", "known"), ("cut", "cannot be reached"),
    ):  # fmt: skip
        with pytest.raises(HeadwaterError, match=said):
            NgramService(index, url=client.url).count("a")
    with pytest.raises(HeadwaterError, match="known"):
        NgramService("words", url=client.url).probability("a")


def test_a_service_that_is_not_there_is_said_to_be(service: tuple[NgramService, list[dict[str, Any]]]) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    with pytest.raises(HeadwaterError, match="cannot be reached"):
        NgramService("x", url=f"http://127.0.0.1:{port}/", timeout=2).count("a")
    with pytest.raises(HeadwaterError, match="web address"):
        NgramService("x", url="file:///etc/passwd")
