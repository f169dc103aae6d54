"""Synthetic results of the kinds of `act`, shaped as their tables are documented."""

from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def act_comparison() -> dict[str, Any]:
    kinds = {"nothing": "control", "prompt": "baseline", f"lora{HOSTILE}": "baseline", "rome": "action"}
    summary = [
        {"action": action, "kind": kind, "measure": measure, "value": 0.2 * at + 0.1, "lo": 0.1 * at,
         "hi": 0.3 * at + 0.1, "n": 3, "note": HOSTILE if at == 2 else ""}
        for at, (action, kind) in enumerate(kinds.items())
        for measure in ("score", "efficacy", "neighbours", "perplexity", "weights")
    ]  # fmt: skip
    versus = [
        {"action": "rome", "baseline": "prompt", "measure": "score", "difference": 0.2, "lo": -0.1, "hi": 0.5, "n": 3}
    ]
    return {"summary": summary, "versus": versus}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {"act_comparison": ("act", act_comparison)}
