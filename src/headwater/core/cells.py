"""Cells on disk: one JSON line each, there as soon as it is known; a line that was cut off by a kill is not."""

import json
import os
from pathlib import Path
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
