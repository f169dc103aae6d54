"""Cells on disk: what is whole is kept, what was cut off is not, and code is told from code."""

import importlib
from pathlib import Path

import pytest

from headwater.core.cells import Cells, code_of
from headwater.core.errors import StoreError


def test_a_line_that_was_cut_off_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    cells.add("one", {"value": 1.5})
    cells.add("two", {"value": float("nan")})
    file = tmp_path / "cells.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "three", "ro')
    again = Cells(tmp_path)
    assert "one" in again and again["two"] == {"value": None} and "three" not in again
    assert file.read_bytes() == whole
    file.write_bytes(b"no json\n" + whole)
    with pytest.raises(StoreError, match="line 1"):
        Cells(tmp_path)


def test_code_is_told_by_what_it_does_and_not_by_what_is_said_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "some_room"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "method.py").write_text('def f(x):\n    """What it does."""\n    return x + 1\n')
    (package / "words.txt").write_text("one two")

    def now() -> str:
        importlib.invalidate_caches()
        code_of.cache_clear()
        return code_of("some_room")

    first = now()
    (package / "inner" / "method.py").write_text('# Said.\ndef f(x):\n    """Said better."""\n\n    return x + 1\n')
    assert now() == first
    (package / "inner" / "method.py").write_text("def f(x):\n    return x + 2\n")
    second = now()
    (package / "words.txt").write_text("one two three")
    third = now()
    (package / "inner" / "other.py").write_text("y = 1\n")
    assert len({first, second, third, now()}) == 4
    assert code_of("some_room", "headwater.core") != code_of("some_room")
