"""Counts equal counting by hand, whatever the text; and kill -9 changes nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.cli import main
from headwater.core.errors import HeadwaterError, StoreError
from headwater.core.results import load_result
from headwater.data import Corpus, Counts, count, read_pairs

Span = tuple[int, int]


def mentions(text: Any, forms: list[Any], whole: bool) -> list[Span]:
    """Spans of any form, none within another, found one place at a time."""
    spans = set()
    for form in forms:
        for start in range(len(text) - len(form) + 1):
            end = start + len(form)
            if text[start:end] != form:
                continue
            if whole:
                joined = [
                    re.fullmatch(r"\w\w", text[i - 1 : i + 1]) is not None for i in (start, end) if 0 < i < len(text)
                ]
                if any(joined):
                    continue
            spans.add((start, end))
    return sorted(s for s in spans if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans))


def sentence_of(text: str, place: int) -> int:
    ended = 0
    for i in range(place):
        after = text[i + 1] if i + 1 < len(text) else " "
        ended += text[i] == "\n" or (text[i] in ".!?" and after in " \t\r\n\u00a0")
    return ended


def word_of(text: str, place: int) -> int:
    return sum(1 for match in re.finditer(r"\w+", text) if match.start() <= place)


def by_hand(documents: list[Any], pairs: Any, scope: str, window: int | None, whole: bool) -> dict[str, Any]:
    """{term: (n, documents)} and {(subject, object): (n, documents)}, a document and a pair at a time."""
    terms = {name: [0, 0] for name in pairs.terms}
    both = {pair: [0, 0] for pair in zip(pairs.subjects, pairs.objects, strict=True)}
    forms = dict(zip(pairs.terms, pairs.forms, strict=True))
    for text in documents:
        spans = {name: mentions(text, list(forms[name]), whole) for name in terms}
        for name, own in spans.items():
            terms[name][0] += len(own)
            terms[name][1] += bool(own)
        for (s, o), total in both.items():
            apart = [(a, b) for a in spans[s] for b in spans[o] if a[1] <= b[0] or b[1] <= a[0]]
            if scope == "window":
                where = word_of if isinstance(text, str) else lambda _, place: place
                n = sum(abs(where(text, a[0]) - where(text, b[0])) <= (window or 0) for a, b in apart)
            elif scope == "sentence":
                pairs_of = ((sentence_of(text, a[0]), sentence_of(text, b[0])) for a, b in apart)
                n = len({x for x, y in pairs_of if x == y})
            else:
                n = int(bool(apart))
            total[0] += n
            total[1] += bool(n)
    return {"terms": terms, "pairs": both}


def as_counted(result: Counts) -> dict[str, Any]:
    terms, pairs = result.tables["terms"], result.tables["pairs"]
    return {
        "terms": {row["term"]: [row["n"], row["documents"]] for row in terms.to_dicts()},
        "pairs": {(row["subject"], row["object"]): [row["n"], row["documents"]] for row in pairs.to_dicts()},
    }


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


# Few letters, so that forms overlap, nest and touch; the marks end words and sentences.
letters = st.text(alphabet="ab. é_\n!", min_size=1, max_size=40).filter(lambda text: bool(text.strip()))
names = st.text(alphabet="abé_ ", min_size=1, max_size=4).filter(lambda text: bool(text.strip()))
one_pair = st.fixed_dictionaries(
    {"subject": names, "object": names, "subject_aliases": st.lists(names, max_size=2), "object_aliases": st.just([])}
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    documents=st.lists(letters, min_size=1, max_size=5),
    pairs=st.lists(one_pair, min_size=1, max_size=5),
    scope=st.sampled_from([("document", None), ("sentence", None), ("window", 1), ("window", 3)]),
    whole=st.booleans(),
    size=st.integers(1, 60),
)
def test_text_counts_equal_counting_by_hand(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], pairs: list[Any], scope: Any, whole: bool, size: int
) -> None:
    corpus = Corpus.open(jsonl(tmp_path_factory.mktemp("texts") / "t.jsonl", documents))
    read = corpus.pieces
    corpus.pieces = lambda cursor=None: read(cursor, size=size)  # type: ignore[method-assign]
    wanted = read_pairs(pairs)
    counted = count(corpus, wanted, scope=scope[0], window=scope[1], whole_words=whole)
    assert as_counted(counted) == by_hand(documents, wanted, *scope, whole)
    assert counted.facts["documents"] == len(documents)
    assert counted.facts["size"] == sum(map(len, documents))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6).flatmap(
        lambda t: st.lists(st.lists(st.integers(0, 3), min_size=t, max_size=t), min_size=1, max_size=6)
    ),
    pairs=st.lists(st.tuples(*[st.text(alphabet="0123", min_size=1, max_size=3)] * 2), min_size=1, max_size=5),
    scope=st.sampled_from([("document", None), ("window", 1), ("window", 2)]),
    separator=st.sampled_from([None, 3]),
)
def test_token_counts_equal_counting_by_hand(rows: Any, pairs: Any, scope: Any, separator: int | None) -> None:
    if separator is not None:
        pairs = [(s.replace("3", "0"), o.replace("3", "0")) for s, o in pairs]
    corpus = Corpus.open(Rows(rows))
    read = corpus.pieces
    corpus.pieces = lambda cursor=None: read(cursor, size=2 * len(rows[0]))  # type: ignore[method-assign]
    wanted = read_pairs(pairs)
    counted = count(
        corpus, wanted, scope=scope[0], window=scope[1], separator=separator, encode=lambda form: [list(map(int, form))]
    )
    documents = ["".join(map(str, row)) for row in rows]
    if separator is not None:
        documents = [part for text in documents for part in text.split("3")]
    # a token is a word and a character at once
    spaced = [Tokens(text) for text in documents]
    hand = by_hand(spaced, wanted, *scope, False)
    assert as_counted(counted) == hand


class Tokens(list[str]):
    """A document of one-letter tokens, whose places are its letters."""

    def __getitem__(self, key: Any) -> Any:
        got = super().__getitem__(key)
        return "".join(got) if isinstance(key, slice) else got


class Rows:
    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.n_sequences, self.sequence_length = rows, len(rows), len(rows[0])

    def tokens(self, index: int) -> list[int]:
        return self.rows[index]


TEXT = [
    "The capital of Niger is Niamey. Nigeria has another.",
    "Niamey lies on the Niger; NIGER flows on.",
    "Luxembourg is the capital of Luxembourg.",
    "Mexico City, in Mexico.",
    "Mexico City alone.",
]
PAIRS = [("Niger", "Niamey"), ("Luxembourg", "Luxembourg"), ("Mexico", "Mexico City")]


def test_what_counts_as_a_mention(tmp_path: Path) -> None:
    counted = as_counted(count(jsonl(tmp_path / "t.jsonl", TEXT), PAIRS))
    assert counted["terms"]["Niger"] == [2, 2]
    assert counted["pairs"] == {
        ("Niger", "Niamey"): [2, 2], ("Luxembourg", "Luxembourg"): [1, 1], ("Mexico", "Mexico City"): [1, 1]
    }  # fmt: skip
    lower = as_counted(count(tmp_path / "t.jsonl", PAIRS, ignore_case=True))
    assert lower["terms"]["Niger"] == [3, 2]
    inside = as_counted(count(tmp_path / "t.jsonl", PAIRS, whole_words=False))
    assert inside["terms"]["Niger"] == [3, 2]
    sentences = as_counted(count(tmp_path / "t.jsonl", [("Niger", "Nigeria")], scope="sentence"))
    assert sentences["pairs"] == {("Niger", "Nigeria"): [0, 0]}


def test_halves_of_characters_do_not_stop_a_count(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(r'{"text": "Niger \ud83d, Niamey \ud83d\ude00"}' + "\n")
    assert as_counted(count(tmp_path / "t.jsonl", PAIRS))["pairs"][("Niger", "Niamey")] == [1, 1]
    (tmp_path / "p.jsonl").write_text(r'{"subject": "\ud83d", "object": "b"}' + "\n")
    with pytest.raises(HeadwaterError, match="cannot be counted"):
        read_pairs(tmp_path / "p.jsonl")


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_ranges_of_steps_add_up(tmp_path: Path, form: str) -> None:
    random = np.random.default_rng(0)
    rows = random.integers(0, 6, size=(40, 12))
    pairs = [("1 2", "3"), ("0", "4 4")]
    options: dict[str, Any] = {}
    if form == "tokens":
        np.save(tmp_path / "t.npy", rows)
        corpus = Corpus.open(tmp_path / "t.npy", batch=4)
        options = {"encode": lambda text: [list(map(int, text.split()))]}
    else:
        corpus = Corpus.open(jsonl(tmp_path / "t.jsonl", [" ".join(map(str, row)) for row in rows]), batch=4)
    whole = count(corpus, pairs, **options)
    assert whole.tables["pairs"]["last"].to_list() == [10, 10]
    cut = count(corpus, pairs, ranges=(0, 1, 3, 10), **options)
    for table in ("terms", "pairs"):
        assert cut.by(10, table).drop("n", "documents").equals(cut.by(3, table).drop("n", "documents"))
        assert cut.by(10, table)["n"].to_list() == whole.tables[table]["n"].to_list()
    some = count(corpus, pairs, ranges=(1, 3), **options)
    middle = cut.tables["pairs"].filter(pl.col("first") == 1)
    assert some.tables["pairs"].equals(middle)
    assert some.facts["documents"] == 8
    assert middle["documents"].sum() > 0
    with pytest.raises(HeadwaterError, match="not cut"):
        cut.by(2)
    for step in (1, 3):  # steps before 1 were left out, so what the checkpoint had seen is not known
        with pytest.raises(HeadwaterError, match="from the beginning"):
            some.by(step)


def test_a_real_tokenizer_keeps_to_whole_words(tiny_tokenizer: Any) -> None:
    texts = ["Paris is in France", "In Paris, France", "Parisian Frances", "(Paris) France.", "Rome"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    size = max(map(len, ids))
    rows = [row + [tiny_tokenizer.eos_token_id] * (size - len(row)) for row in ids]
    counted = as_counted(count(Rows(rows), [("Paris", "France")], tokenizer=tiny_tokenizer))
    assert counted["pairs"][("Paris", "France")] == [3, 3]
    inside = as_counted(count(Rows(rows), [("Paris", "France")], tokenizer=tiny_tokenizer, whole_words=False))
    assert inside["terms"]["Paris"][0] == 4


def test_marks_that_are_several_bytes_end_a_word_and_letters_that_are_do_not(tiny_tokenizer: Any) -> None:
    """Byte-level tokenizers spell a curly quote with letters, and the end of `é` with a sign."""
    texts = ["“Paris” it is", "Paris—Rome", "Parisé it is", "éParis it is"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    size = max(map(len, ids))
    rows = [row + [tiny_tokenizer.eos_token_id] * (size - len(row)) for row in ids]
    corpus = Rows(rows)
    per_row = [
        count(Rows([row]), [("Paris", "Rome")], tokenizer=tiny_tokenizer).tables["terms"]["n"][0] for row in rows
    ]
    assert per_row == [1, 1, 0, 0]
    assert as_counted(count(corpus, [("Paris", "Rome")], tokenizer=tiny_tokenizer))["terms"]["Paris"] == [2, 2]


def test_pairs_from_files(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("subject,object,subject_aliases\nUSA,Washington,United States|US\nUSA,Dallas,\n")
    read = read_pairs(tmp_path / "p.csv")
    assert dict(zip(read.terms, read.forms, strict=True))["USA"] == ("USA", "United States", "US")
    assert (read.subjects, read.objects) == (["USA", "USA"], ["Washington", "Dallas"])
    (tmp_path / "r.json").write_text(json.dumps({"samples": [{"subject": "a", "object": "b"}]}))
    (tmp_path / "r.jsonl").write_text('{"subject": "a", "object": "b"}\n')
    assert read_pairs(tmp_path / "r.json").terms == read_pairs(tmp_path / "r.jsonl").terms == ("a", "b")
    # only a new line ends a line, whatever else Unicode calls one; Windows writes a return before it
    strange = '{"subject": "a\u2028b\x85", "object": "b"}\r\n{"subject": "c", "object": "d"}\r\n'
    (tmp_path / "s.jsonl").write_bytes(strange.encode())
    assert read_pairs(tmp_path / "s.jsonl").terms == ("a\u2028b", "b", "c", "d")
    for bad in ("x,y\n1,2\n", "subject,object\n,b\n"):
        (tmp_path / "p.csv").write_text(bad)
        with pytest.raises(HeadwaterError):
            read_pairs(tmp_path / "p.csv")


@pytest.mark.parametrize(
    "options",
    [{"scope": "page"}, {"scope": "window"}, {"window": 3}, {"ranges": (1,)}, {"ranges": (3, 1)}, {"whole": True},
     {"separator": 1}],
)  # fmt: skip
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(HeadwaterError):
        count(jsonl(tmp_path / "t.jsonl", TEXT), PAIRS, **options)


# Counts in forked children that are killed: libraries are loaded once, not once a kill.
DRIVER = """
import os, random, signal, sys, time
from headwater.data import Corpus, count
import headwater.data.counts, headwater.data.matching, polars, safetensors.numpy
source, pairs, out, kills = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
chance = random.Random(5)

def child():
    pid = os.fork()
    if pid == 0:
        corpus = Corpus.open(source, batch=3)
        read = corpus.pieces
        corpus.pieces = lambda cursor=None: (time.sleep(0.01) or piece for piece in read(cursor, size=200))
        count(corpus, pairs, out=out, scope="window", window=4, ranges=(0, 7, 40, 90), save_seconds=0)
        os._exit(0)
    return pid

done = 0
for _ in range(kills):
    pid = child()
    time.sleep(chance.uniform(0.0, 0.12))
    if os.waitpid(pid, os.WNOHANG)[0]:
        break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    done += 1
print(done, os.waitstatus_to_exitcode(os.waitpid(child(), 0)[1]))
"""


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_killed_at_twenty_moments_it_counts_the_same(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(1)
    words = [f"w{i}" for i in range(30)]
    documents = [" ".join(random.choice(words, size=30)) for _ in range(300)]
    jsonl(tmp_path / "t.jsonl", documents)
    pl.DataFrame({"text": documents}).write_parquet(tmp_path / "t.parquet", row_group_size=70)
    (tmp_path / "p.csv").write_text("subject,object\n" + "".join(f"w{i},w{(3 * i + 1) % 30}\n" for i in range(30)))
    kills = 20 if name == "t.jsonl" else 3
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path / name), str(tmp_path / "p.csv"),
         str(tmp_path / "out"), str(kills)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, status = map(int, done.stdout.split())
    assert status == 0
    assert killed >= 0.7 * kills, "too few kills met a running count"
    corpus = Corpus.open(tmp_path / name, batch=3)
    plain = count(corpus, tmp_path / "p.csv", scope="window", window=4, ranges=(0, 7, 40, 90))
    kept = load_result(tmp_path / "out" / "counts", check=True)
    assert kept.content_hash == plain.content_hash
    assert kept.tables["pairs"]["n"].sum() > 100
    with pytest.raises(StoreError, match="another corpus"):
        count(corpus, tmp_path / "p.csv", out=tmp_path / "out")
    again = count(corpus, tmp_path / "p.csv", scope="window", window=4, ranges=(0, 7, 40, 90), out=tmp_path / "out")
    assert again.content_hash == plain.content_hash


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(tmp_path / "t.jsonl", TEXT)
    (tmp_path / "p.csv").write_text("subject,object\nNiger,Niamey\n")
    arguments = ["count", str(tmp_path / "t.jsonl"), "--pairs", str(tmp_path / "p.csv"), "--out", str(tmp_path / "out")]
    arguments += ["--batch", "2", "--ranges", "0,1,3", "--set", "column=text"]
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *extra])
        assert not end.value.code
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["first"], row["last"], row["n"]) for row in told["pairs"]] == [(0, 1, 2), (1, 3, 0)]
    with pytest.raises(SystemExit) as end:
        main([*arguments[:4], "--set", "colum=text"])
    assert end.value.code == 2
