"""Synthetic results of the kinds of `data`, shaped as their tables are documented."""

from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def counts() -> dict[str, Any]:
    pairs = [
        {"subject": f"country {i}{HOSTILE}", "object": f"city {i}", "first": first, "last": 10 * first + 10,
         "n": 3**i, "documents": 2**i}
        for first in (0, 10)
        for i in range(9)
    ]  # fmt: skip
    terms = [{"term": row["subject"], **{k: row[k] for k in ("first", "last", "n", "documents")}} for row in pairs]
    return {"pairs": pairs, "terms": terms}


def lre() -> dict[str, Any]:
    sweep = [
        {"layer": layer, "what": what, "setting": float(setting), "value": (layer + 2) * setting / 100, "lo": 0.0,
         "hi": 1.0, "n": 24}
        for layer in (-1, 0, 2)
        for what in ("faithfulness", "causality")
        for setting in range(0, 20, 4)
    ]  # fmt: skip
    rows = [
        {"subject": f"{i}{HOSTILE}", "object": "b", "said": " b", "lre": " b", "faithful": True, "target": "c",
         "edited": HOSTILE, "causal": False}
        for i in range(4)
    ]  # fmt: skip
    return {"sweep": sweep, "examples": rows}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "counts": ("localize", counts),
    "lre": ("localize", lre),
}
