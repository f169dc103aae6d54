"""Progress: silent for a caller of the library, a bar on a terminal, sparse lines in a log; results never change."""

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from headwater.core import progress


def test_silent_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    things = [1, 2, 3]
    assert progress.track(things, "x") is things
    progress.note("hello")
    assert capsys.readouterr() == ("", "")


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with progress.progress_shown():
        assert list(progress.track(range(5), "patching")) == [0, 1, 2, 3, 4]
        progress.note("stage: done")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "  patching: 2/5\n  patching: 4/5\nstage: done\n"  # every second step is more than ten seconds later


def test_shown_ends_with_its_block(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="stop"), progress.progress_shown():
        raise ValueError("stop")
    progress.note("hidden")
    assert capsys.readouterr().err == ""


def test_a_generator_of_unknown_length() -> None:
    def things() -> Iterator[int]:
        yield from (1, 2)

    with progress.progress_shown():
        assert list(progress.track(things(), "x")) == [1, 2]


NESTED = """
from headwater.core.progress import note, progress_shown, track
with progress_shown():
    seen = [(a, b) for a in track(range(3), "outer") for b in track(range(2), "inner")]
    for a in track(range(3), "left early"):
        break
    note("the end")
assert len(seen) == 6
print("fine")
"""


def test_bars_inside_bars_on_a_terminal() -> None:
    master, slave = pty.openpty()
    done = subprocess.run([sys.executable, "-c", NESTED], stderr=slave, stdout=-1, text=True, timeout=60)
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert done.returncode == 0 and done.stdout == "fine\n", shown
    assert "outer" in shown and "inner" in shown and "the end" in shown
    assert "Traceback" not in shown
