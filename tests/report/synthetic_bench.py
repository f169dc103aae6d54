"""Synthetic results of the bench's kinds, shaped as its tables are documented."""

import random
from collections.abc import Callable
from typing import Any

HOSTILE = "</script><script>alert(1)</script>"


def siit_report() -> dict[str, Any]:
    rows = [
        {"node": f"a{i}.h{i}", "role": role, "variables": [HOSTILE], "accuracy": 0.97, "lo": 0.95, "hi": 0.99,
         "n": 100, "moved": 0.6, "accuracy_moved": 0.96, "shift": 0.1}
        for i, role in enumerate(["model", "inside", "inside", "outside", "outside", "all inside", "all outside"])
    ]  # fmt: skip
    return {"nodes": rows}


def recovery() -> dict[str, Any]:
    rng = random.Random(1)
    nodes = [{"node": f"a{i}.h1{HOSTILE}", "score": rng.random(), "true": i < 3} for i in range(12)]
    return {"nodes": nodes}


def superposition() -> dict[str, Any]:
    cells = [
        {
            "instance": 3 * i + j,
            "density": 0.1 * (i + 1),
            "importance": 0.5 * (j + 1),
            "loss": 0.1,
            "phase": phase,
            "predicted": "dedicated",
        }
        for i in range(3)
        for j, phase in enumerate(["not represented", "superposition", "dedicated"])
    ]
    return {"instances": cells}


def algebra() -> dict[str, Any]:
    rng = random.Random(2)
    rows = [
        {"irrep": f"cos {k}{HOSTILE}", "dimension": 2, "embedding": rng.random(), "logits": rng.random(),
         "neurons": rng.random(), "key": k < 3}
        for k in range(8)
    ]  # fmt: skip
    return {"irreps": rows}


def learned_program() -> dict[str, Any]:
    rows = [
        {"seed": i, "accuracy": 0.8 + i / 20, "exact": 0.5, "lo": 0.7, "hi": 0.99, "soft": 0.9, "best": i == 3}
        for i in range(4)
    ]
    return {"runs": rows}


def mips() -> dict[str, Any]:
    rows = [
        {"task": f"task_{i}{HOSTILE}", "solved": i % 2 == 0, "held_out": 1.0 - i / 10, "longer": 0.5, "why": "no map"}
        for i in range(8)
    ]
    return {"tasks": rows}


def published_scores() -> dict[str, Any]:
    rows = [
        {"task": HOSTILE, "method": method, "site": f"resid_post.{i}", "position": "last", "measure": measure,
         "value": 0.5 + i / 10, "lo": 0.4, "hi": 0.9, "n": 20}
        for measure in ("cause", "isolate")
        for method in ("full", "subspace")
        for i in range(3)
    ]  # fmt: skip
    return {"scores": rows}


def minimality() -> dict[str, Any]:
    rows = [
        {"node": f"a{i}.h0{HOSTILE}", "faithfulness": 0.6, "drop": 0.3 - i / 20, "lo": -0.1, "hi": 0.4}
        for i in range(8)
    ]
    return {"nodes": rows}


def truth_scores() -> dict[str, Any]:
    rows = [
        {"method": f"eap_{i}{HOSTILE}", "what": "baseline" if i == 3 else "method", "measure": measure,
         "value": 0.9 - i / 10, "lo": 0.8 - i / 10, "hi": 0.95 - i / 10, "models": 30, "cells": 90}
        for measure in ("edge_auroc", "node_auroc", "edge_ap")
        for i in range(4)
    ]  # fmt: skip
    return {"scores": rows}


TABLES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "siit_report": ("circuit", siit_report),
    "recovery": ("circuit", recovery),
    "superposition": ("localize", superposition),
    "algebra": ("localize", algebra),
    "learned_program": ("circuit", learned_program),
    "mips": ("circuit", mips),
    "published_scores": ("localize", published_scores),
    "minimality": ("circuit", minimality),
    "truth_scores": ("localize", truth_scores),
}
