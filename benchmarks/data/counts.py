"""MB of text a second on one core: counting terms and pairs, beside the bare multi-pattern scan of the same text.

`python -m benchmarks.data.counts [TEXT]`: a text file is said over and over until there are 64 MB of documents, with
names put in at random; without one, words are drawn by Zipf's law. 3,241 pairs of names. The scan: `ahocorasick_rs`
over each document as Python text, its matches thrown away. `count` reads JSONL, so the scan is given with reading it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import ahocorasick_rs as ac
import numpy as np

from headwater.data import Corpus, count, read_pairs

PAIRS, MEGABYTES, ROUNDS = 3241, 64, 3


def documents(source: str | None, names: list[str], megabytes: int) -> list[str]:
    """Documents of about 1,000 characters; a fifth of them hold two to six of the names."""
    random = np.random.default_rng(0)
    if source is not None:
        text = Path(source).read_text(encoding="utf-8").split()
    else:
        words = ["".join(random.choice(list("etaoinshrdlu"), size=n)) for n in random.integers(2, 10, size=20000)]
        text = random.choice(words, size=400_000, p=(p := 1 / np.arange(1, 20001)) / p.sum()).tolist()
    made, size, at = list[str](), 0, 0
    while size < megabytes * 1_000_000:
        part = text[at : at + 170]
        at = (at + 170) % (len(text) - 170)
        if random.random() < 0.2:
            for name in random.choice(names, size=random.integers(2, 7)):
                part.insert(int(random.integers(0, len(part))), str(name))
        made.append(" ".join(part))
        size += len(made[-1].encode())
    return made


def main() -> int:
    random = np.random.default_rng(1)
    syllables = ["ka", "ro", "mi", "len", "tor", "sa", "ve", "ndi", "bur", "gh", "sta", "no"]
    names = sorted({"".join(random.choice(syllables, size=n)).title() for n in random.integers(3, 6, size=4000)})
    pairs = read_pairs(list({(str(s), str(o)) for s, o in random.choice(names, size=(PAIRS, 2))}))
    made = documents(sys.argv[1] if len(sys.argv) > 1 else None, names, MEGABYTES)
    size = sum(len(text.encode()) for text in made) / 1e6
    forms = [form for own in pairs.forms for form in own]
    automaton = ac.AhoCorasick(forms, matchkind=ac.MatchKind.Standard)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: object) -> None:
        started = time.process_time()
        work()  # type: ignore[operator]
        seconds.setdefault(name, []).append(time.process_time() - started)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in made))
        corpus = Corpus.open(path)

        def scan(texts: object) -> None:
            for text in texts:  # type: ignore[attr-defined]
                automaton.find_matches_as_indexes(text, overlapping=True)

        def reading() -> None:
            scan(json.loads(line)["text"] for line in path.open("rb"))

        for _ in range(ROUNDS):
            timed("bare scan", lambda: scan(made))
            timed("reading and bare scan", reading)
            for scope, window in (("document", None), ("sentence", None), ("window", 20)):
                timed(f"count, {scope}", lambda s=scope, w=window: count(corpus, pairs, scope=s, window=w))
    print(f"{size:.0f} MB, {len(made):,} documents, {len(pairs.of):,} pairs, {len(forms):,} forms")
    print("| | MB/s a core | share of the bare scan |\n|---|---|---|")
    base = np.median(seconds["bare scan"])
    for name, taken in seconds.items():
        low, high = size / max(taken), size / min(taken)
        print(f"| {name} | {size / np.median(taken):.0f} ({low:.0f} to {high:.0f}) | {base / np.median(taken):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
