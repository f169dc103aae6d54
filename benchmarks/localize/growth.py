"""How the cost of EAP, EAP-IG and circuit evaluation grows: with layers, width, heads, prompt length, number of pairs.

One thing grows at a time, from one base setting (random GPT-2s). Each cost is CPU seconds on one thread, fitted by
seconds = c * size^k (least squares on logarithms); k stands beside that of the method's floor on the same model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import measure, pairs
from benchmarks.localize.circuits import FRACTION, STEPS, Floor, one_group

VOCABULARY = 1000
METHODS = ("EAP", "EAP-IG", "evaluation")


@dataclass(frozen=True)
class Size:
    """A model and its pairs."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    length: int = 32
    pairs: int = 16


GROWTH: dict[str, tuple[int, ...]] = {
    "layers": (3, 6, 12, 24),
    "width": (128, 256, 512, 1024),
    "heads": (2, 4, 8, 16, 32),
    "length": (16, 32, 64, 128, 256),
    "pairs": (4, 16, 64, 256),
}


def model_of(size: Size) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    import headwater as hw

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=size.width, n_layer=size.layers, n_head=size.heads, n_positions=512,
        initializer_range=0.05,
    )  # fmt: skip
    return hw.Model(GPT2LMHeadModel(config).eval(), pairs.word_tokenizer(VOCABULARY), name=f"gpt2-random-{size}")


def jobs_of(size: Size) -> dict[str, Callable[[], object]]:
    from headwater import localize

    model = model_of(size)
    behavior = pairs.random_pairs(size.pairs, size.length, size.length // 2, VOCABULARY)
    floor = Floor(model.hf, one_group(model, behavior))
    circuit = localize.eap(model, behavior).circuit(fraction=FRACTION)
    return {
        "EAP": lambda: localize.eap(model, behavior),
        "EAP-IG": lambda: localize.eap_ig(model, behavior, steps=STEPS),
        "evaluation": lambda: circuit.faithfulness(behavior),
        "floor of EAP": floor.eap,
        "floor of EAP-IG": floor.eap_ig,
        "floor of evaluation": floor.evaluation,
    }


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> str:
    """k of seconds = c * size^k with its standard error."""
    fit = stats.linregress(np.log(sizes), np.log(seconds))
    return f"{fit.slope:.2f} ± {fit.stderr:.2f}"


def grow(what: str, sizes: tuple[int, ...], rounds: int) -> list[list[str]]:
    found: dict[str, list[measure.Spread]] = {}
    for number in sizes:
        spent = measure.interleaved(jobs_of(replace(Size(), **{what: number})), rounds)
        for job, times in spent.items():
            found.setdefault(job, []).append(measure.Spread.of(times))
    rows = []
    for method in METHODS:
        own, floor = found[method], found[f"floor of {method}"]
        rows.append([
            what, method, f"{sizes[0]} to {sizes[-1]}",
            ", ".join(f"{o.median / f.median:.2f}" for o, f in zip(own, floor, strict=True)),
            exponent(sizes, [o.median for o in own]), exponent(sizes, [f.median for f in floor]),
        ])  # fmt: skip
    return rows


def main() -> None:
    arguments = measure.begin("Growth", threads=1)
    rows = [row for what, sizes in GROWTH.items() for row in grow(what, sizes, arguments.rounds or 3)]
    base = Size()
    measure.table(
        f"Random GPT-2s around {base.layers} layers, width {base.width}, {base.heads} heads, {base.pairs} pairs of "
        f"{base.length} tokens (half of them shared); the floor of an evaluation is two forwards",
        ["what grows", "method", "from, to", "over its floor, by size", "cost grows as size to the", "its floor's"],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
