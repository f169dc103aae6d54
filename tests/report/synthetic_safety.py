"""Synthetic results of what tells prompts apart, shaped as their tables are documented."""

from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def detection() -> dict[str, Any]:
    parts = [
        {"part": f"a{i}.h1", "kind": "head", "yes": 0.1 * i, "no": 0.2, "auroc": 0.5 + i / 20, "chosen": i > 3}
        for i in range(6)
    ]
    detectors = [
        {"detector": f"detector {i}{HOSTILE}", "auroc": 0.5 + i / 10, "lo": 0.4 + i / 10, "hi": 0.6 + i / 10, "n": 24,
         "baseline": i == 0}
        for i in range(6)
    ]  # fmt: skip
    return {"parts": parts, "detectors": detectors}


def head_importance() -> dict[str, Any]:
    heads = [
        {"layer": layer, "head": head, "score": 0.1 * layer + 0.01 * head, "elsewhere": 0.05 * layer}
        for layer in range(4)
        for head in range(4)
    ]
    group = [
        {"order": i + 1, "head": f"a3.h{i}", "found": 0.4, "score": 0.3 + 0.1 * i, "random": 0.1, "lo": 0.05, "hi": 0.2}
        for i in range(3)
    ]
    return {"heads": heads, "group": group}


def pruning() -> dict[str, Any]:
    curve = [
        {"by": by, "share": share, "metric": 3.0 - 4 * share - at, "accuracy": 0.9,
         "perplexity": 20.0 + at + 50 * share, "lo": 1.0, "hi": 3.0}
        for at, by in enumerate(("relevance", "magnitude", "random"))
        for share in (0.05, 0.1, 0.2, 0.4)
    ]  # fmt: skip
    return {"curve": curve}


def cue_groups() -> dict[str, Any]:
    groups = [
        {"source": source, "group": f"group {i}{HOSTILE}", "train": 9, "n": 12, "accuracy": 0.3 + 0.2 * i,
         "lo": 0.2 + 0.2 * i, "hi": 0.4 + 0.2 * i}
        for source in ("noun_agrees", "clusters")
        for i in range(3)
    ]  # fmt: skip
    sources = [{"source": source, "spread": 0.2, "p": 0.01} for source in ("clusters", "noun_agrees")]
    return {"groups": groups, "sources": sources}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "detection": ("act", detection),
    "head_importance": ("act", head_importance),
    "pruning": ("act", pruning),
    "cue_groups": ("act", cue_groups),
}
