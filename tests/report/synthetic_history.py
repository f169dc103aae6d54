"""Synthetic results of the stages about a model's history, shaped as their tables are documented."""

import math
from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"
STEPS = (0, 1, 4, 16, 64, 256, 1000)


def formation() -> dict[str, Any]:
    curves = [
        {"step": step, "what": what, "split": split, "value": 1 / (1 + math.exp(4 - late - i)), "lo": 0.0, "hi": 1.0,
         "n": 20}
        for i, step in enumerate(STEPS)
        for what, late in (("behavior", 0.0), ("circuit", -0.5), ("known", -1.0), (HOSTILE, 0.0))
        for split in ("train", "test")
    ]  # fmt: skip
    windows = [
        {"what": what, "first": 16, "last": last, "share": 0.8, "held": 0.9, "half": 40.0}
        for what, last in (("behavior", 256), ("circuit", 1000))
    ]
    pairs = [
        {"step": step, "id": f"{i}{HOSTILE}", "split": ("train", "test")[i % 2], "whole": float(i), "part": 0.5 * i,
         "known": i > 2}
        for step in STEPS
        for i in range(4)
    ]  # fmt: skip
    return {"curves": curves, "windows": windows, "pairs": pairs}


def fact_link() -> dict[str, Any]:
    facts = [
        {"step": step, "fact": f"{i}{HOSTILE}", "split": ("train", "test")[i % 2], "pair": step * i // 4,
         "subject": step * i, "object": step, "known": float(step * i > 500)}
        for step in STEPS
        for i in range(12)
    ]  # fmt: skip
    predictors = [
        {"predictor": name, "auc": auc, "lo": auc - 0.1, "hi": min(1.0, auc + 0.1), "log_loss": 0.4, "n": 6}
        for name, auc in (("pair", 0.95), ("subject", 0.7), ("object", 0.6), ("step", 0.5))
    ]
    return {"facts": facts, "predictors": predictors}


def fact_change() -> dict[str, Any]:
    rows = [
        {"fact": f"{i}{HOSTILE}", "split": ("train", "test")[i % 2], "log_count": 2.0, "log_count_redone": 2.0 + i / 4,
         "known": 0.5, "known_redone": 0.5 + i / 40, "change_count": i / 4, "change_known": i / 40}
        for i in range(-8, 9)
    ]  # fmt: skip
    return {"facts": rows}


FACTS: dict[str, dict[str, Any]] = {
    "formation": {"metric": "logit_diff", "steps": list(STEPS), "share": 0.8},
    "fact_link": {"threshold": 60.0, "lo": 30.0, "hi": 110.0, "slope": 1.4, "auc": 0.95, "p": 0.01, "null_mean": 0.5,
                  "facts": 12, "steps": 7, "test_facts": 6},
    "fact_change": {"r": 0.9, "lo": 0.8, "hi": 0.95, "p": 0.01, "null_mean": 0.0, "n": 17, "moved": 16},
}  # fmt: skip
TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "formation": ("timeline", formation),
    "fact_link": ("data", fact_link),
    "fact_change": ("do_data", fact_change),
}
