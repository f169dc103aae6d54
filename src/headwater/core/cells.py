"""Cells on disk: one JSON line each, there as soon as it is known; a line that was cut off by a kill is not."""

import ast
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

from headwater.core.errors import StoreError
from headwater.core.files import store_error, to_json


class Cells:
    """Rows by key, kept in `folder/cells.jsonl` where a folder is given."""

    def __init__(self, folder: Path | None) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self._path = None if folder is None else folder / "cells.jsonl"
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._read(self._path)
            except OSError as error:
                raise store_error(error, self._path, "read") from error

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row; it is on the disk when this returns. Raises StoreError."""
        line = to_json({"key": key, "row": row}, indent=None)
        self._rows[key] = json.loads(line)["row"]
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise store_error(error, self._path, "write") from error

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the process was killed while it wrote this line
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                stored = json.loads(line)
                self._rows[stored["key"]] = dict(stored["row"])
            except (ValueError, KeyError, TypeError):
                fix = "Remove that line; its cell is run again"
                raise StoreError("a stored cell cannot be read", got=f"{path}, line {number}", fix=fix) from None


@functools.cache
def code_of(*packages: str) -> str:
    """16 hex digits of what the code of these packages does, and of the files beside it: a part of the key of a cell,
    so that a method that was changed does not get its old cells.

    Python is read without docstrings, comments and layout: better words throw no work away. Read once a process.
    """
    digest = hashlib.sha256()
    for name in packages:
        spec = find_spec(name)
        for root in map(Path, (spec.submodule_search_locations or []) if spec is not None else []):
            for file in sorted(one for one in root.rglob("*") if one.is_file() and "__pycache__" not in one.parts):
                what = _bare(file.read_bytes()) if file.suffix == ".py" else file.read_bytes()
                digest.update(f"{name}/{file.relative_to(root).as_posix()} {len(what)} ".encode() + what)
    return digest.hexdigest()[:16]


def code_of_function(function: Any) -> str:
    """16 hex digits of a function's own instructions; what it calls, or closes over, does not count."""
    inside = getattr(function, "func", function)  # of functools.partial
    code = getattr(inside, "__code__", None) or getattr(type(inside).__call__, "__code__", None)
    told = [repr(getattr(inside, "__defaults__", None)), repr(getattr(inside, "__kwdefaults__", None))]
    if inside is not function:
        told += [repr(function.args), repr(function.keywords)]
    return hashlib.sha256("\n".join([*told, *_instructions(code)]).encode()).hexdigest()[:16]


def _instructions(code: Any) -> Iterator[str]:
    if not isinstance(code, CodeType):
        return
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield repr(constant)


def _bare(source: bytes) -> bytes:
    """A syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            del node.body[0]  # type: ignore[attr-defined]
    return ast.dump(tree).encode()
