"""Synthetic results of the kinds of `dynamics`, shaped as their tables are documented."""

import random
from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def training() -> dict[str, Any]:
    curve = [
        {"step": step, "loss": 3.0 / (1 + step / 50), "lr": 1e-3, "grad_norm": 1.0, "tokens": 100 * step}
        for step in range(1, 120)
    ]
    validation = [
        {"step": step, "name": name, "loss": 2.5 / (1 + step / 40), "accuracy": step / 120}
        for step in range(0, 120, 20)
        for name in ("held out", HOSTILE)
    ]
    return {"curve": curve, "validation": validation}


def timeline() -> dict[str, Any]:
    rng = random.Random(4)
    values = [
        {"step": step, "measure": measure, "name": name, "value": step / 1000 + rng.random() / 9, "lo": 0.1, "hi": 0.9}
        for step in (0, 1, 2, 4, 8, 16, 100, 1000)
        for measure, name in (("loss", ""), ("heads", f"induction a0.h1{HOSTILE}"), ("heads", "previous_token a1.h0"))
    ]
    transitions = [
        {"measure": "loss", "name": "", "step": 16.0, "lo": 8.0, "hi": 100.0, "before": 3.0, "after": 1.0, "p": 0.01}
    ]
    return {"values": values, "transitions": transitions}


def series_audit() -> dict[str, Any]:
    rows = [
        {"step": 2**i, "name": f"step{2**i}{HOSTILE}", "sha256": f"{i:064x}", "norm": 10.0 + i, "drift": 0.1,
         "per_step": 0.01, "nearest": 2 ** max(0, i - 1), "nearest_distance": 0.1, "same_as": None,
         "flag": "identical" if i == 3 else "", "why": HOSTILE}
        for i in range(9)
    ]  # fmt: skip
    return {"checkpoints": rows}


def connectivity() -> dict[str, Any]:
    rows = [
        {"part": i / 10, "loss": 1 + i * (10 - i) / 20, "lo": 0.9, "hi": 2.6, "straight": 1.0,
         "above": i * (10 - i) / 20, "above_lo": 0.0, "above_hi": 2.0}
        for i in range(11)
    ]  # fmt: skip
    return {"line": rows}


def delta() -> dict[str, Any]:
    components = [
        {"component": f"{kind} {layer}", "kind": kind, "layer": layer, "weights": 100, "norm": 3.0,
         "change": 0.1 + layer, "relative": 0.1, "share": 0.1, "cosine": 0.99}
        for kind in ("attention", "mlp", HOSTILE)
        for layer in range(3)
    ]  # fmt: skip
    revival = [
        {"how": how, "fraction": fraction, "weights": 10, "value": 1.0, "lo": 0.5, "hi": 1.5, "back": 10 * fraction,
         "null": 0.0, "null_most": 0.01}
        for how in ("prune", "restore")
        for fraction in (0.001, 0.01, 0.1)
    ]  # fmt: skip
    layers = [
        {"layer": layer, "value": 1.0, "lo": 0.5, "hi": 1.5, "back": 0.9, "probe_old": 0.8, "probe_new": None,
         "probe_classes": 4}
        for layer in range(3)
    ]  # fmt: skip
    return {"components": components, "revival": revival, "layers": layers}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "training": ("localize", training),
    "timeline": ("localize", timeline),
    "series_audit": ("localize", series_audit),
    "connectivity": ("localize", connectivity),
    "delta": ("localize", delta),
}
