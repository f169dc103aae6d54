"""Lists of plain values out of pickle files, without unpickling: nothing in such a file is ever called or imported.

InterpBench publishes its circuits as pickled lists of pairs of texts. This reads the pickle's own instructions and
follows those that build lists, tuples, dicts, texts and numbers; it refuses any other.
"""

import pickletools
from typing import Any

from headwater.core.errors import StoreError

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *(
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "UNICODE",
        "BININT",
        "BININT1",
        "BININT2",
        "INT",
        "LONG1",
        "LONG",
    ),
    *("BINFLOAT", "FLOAT", "SHORT_BINSTRING", "BINSTRING", "STRING"),
}
_SKIPPED = {"PROTO", "FRAME"}
_MOST_BYTES = 50_000_000
_MARK = object()


def read_plain(data: bytes, *, what: str) -> Any:
    """The value that `data` pickles, where it is made of plain values. Raises StoreError for anything else."""
    if len(data) > _MOST_BYTES:
        raise StoreError(f"{what} is too large", got=f"{len(data)} bytes", wanted=f"at most {_MOST_BYTES}")
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                if len(stack) != 1:
                    raise ValueError("the stack does not end with one value")
                return stack[0]
            _follow(opcode.name, argument, stack, memo)
    except StoreError:
        raise
    except Exception as error:  # pickletools and a malformed stack raise many types
        raise StoreError(f"{what} is no whole pickle file", got=f"{type(error).__name__}: {error}") from error
    raise StoreError(f"{what} is no whole pickle file", got="no end")


def _follow(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _SKIPPED:
        return
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _LITERALS:
        stack.append(argument)
    elif name == "MARK":
        stack.append(_MARK)
    elif name in ("EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT"):
        stack.append({"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}[name]())
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        size = int(name[-1])
        stack[-size:] = [tuple(stack[-size:])]
    elif name in ("TUPLE", "LIST"):
        items = _to_mark(stack)
        stack.append(tuple(items) if name == "TUPLE" else items)
    elif name == "APPEND":
        value = stack.pop()
        stack[-1].append(value)
    elif name == "APPENDS":
        items = _to_mark(stack)
        stack[-1].extend(items)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        stack[-1][key] = value
    elif name in ("SETITEMS", "DICT"):
        items = _to_mark(stack)
        if name == "DICT":
            stack.append({})
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
        memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[int(argument)])
    else:
        raise StoreError(
            "this pickle file holds more than plain values, and headwater runs no code of files",
            got=f"the instruction {name}" + (f" {argument!r}" if isinstance(argument, str) else ""),
            wanted="lists, tuples, dicts, texts and numbers",
            fix="Convert it to JSON where you trust it",
        )


def _to_mark(stack: list[Any]) -> list[Any]:
    at = max(index for index, value in enumerate(stack) if value is _MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items
