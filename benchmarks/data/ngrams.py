"""MB of token ids a second on one core to build an n-gram index, and queries a second.

`python -m benchmarks.data.ngrams`: 10 million token ids of 16 bits (20 MB), drawn by Zipf's law over 30,000 words; then
every third sequence is a copy of an earlier one, so that long n-grams repeat.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from headwater.data import NgramIndex

TOKENS, LENGTH, WORDS = 10_000_000, 128, 30_000


def main() -> int:
    draw = np.random.default_rng(0)
    chance = 1 / np.arange(1, WORDS + 1)
    rows = draw.choice(WORDS, size=(TOKENS // LENGTH, LENGTH), p=chance / chance.sum()).astype(np.uint16)
    again = np.arange(0, len(rows), 3)[1:]
    rows[again] = rows[draw.integers(0, again)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, rows)
        started = time.process_time()
        index = NgramIndex.build(file)
        seconds = time.process_time() - started
        size = rows.nbytes / 1e6
        index.save(Path(folder) / "index")
        stored = sum(one.stat().st_size for one in (Path(folder) / "index").iterdir()) / 1e6
        print(f"built: {size:.0f} MB in {seconds:.1f} s, {size / seconds:.1f} MB/s; {stored:.0f} MB on the disk")
        opened = NgramIndex.open(Path(folder) / "index")
        for n in (1, 3, 5, 20):
            asked = [rows[row, :n].tolist() for row in draw.integers(0, len(rows), 1000)]
            started = time.process_time()
            found = sum(opened.count(one) for one in asked)
            seconds = time.process_time() - started
            print(f"{n}-grams: {1000 / seconds:,.0f} counts a second (mean count {found / 1000:,.1f})")
        asked = [rows[row, :5].tolist() for row in draw.integers(0, len(rows), 300)]
        started = time.process_time()
        for one in asked:
            opened.next(one)
        print(f"next tokens of 5-grams: {300 / (time.process_time() - started):,.0f} a second")
        check = rows[:, :-1][rows[:, 1:] == asked[0][1]]
        assert int((check == asked[0][0]).sum()) == opened.count(asked[0][:2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
