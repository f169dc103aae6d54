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


def _points() -> list[dict[str, Any]]:
    return [
        {"step": step, "relation": f"relation {i}{HOSTILE}", "subjects": subjects, "n": 20, "pair": i * step / 400,
         "subject": i * step / 300, "object": i * step / 200, "causality": min(1.0, i * step / 1000), "lo": 0.0,
         "hi": 1.0, "said_causality": 0.5, "accuracy": 0.3, "log_prob": -2.0, "faithfulness": 0.4}
        for subjects in ("all", "several")
        for step in (0, 16, 100)
        for i in range(8)
    ]  # fmt: skip


def strengths() -> dict[str, Any]:
    return {"relations": _points()}


def frequency_link() -> dict[str, Any]:
    return {"points": _points()}


def counterfactual_pretraining() -> dict[str, Any]:
    changes = [
        {"step": step, "relation": f"relation {i}{HOSTILE}", "n": 20, "pair": (i - 4) / 4, "causality": (i - 4) / 9,
         "accuracy": (i - 4) / 8, "log_prob": i - 4.0}
        for step in (10, 100)
        for i in range(9)
    ]  # fmt: skip
    return {"changes": changes}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "counts": ("localize", counts),
    "lre": ("localize", lre),
    "strengths": ("data", strengths),
    "frequency_link": ("data", frequency_link),
    "counterfactual_pretraining": ("data", counterfactual_pretraining),
}
