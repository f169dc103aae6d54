"""Steering curves on SmolLM2, with what they cost plain text: `python -m benchmarks.act.curves OUT.svg`.

Four methods at one site of IOI, pushed toward the order ABBA from the prompt's end on; the metric on test pairs, and
the perplexity of plain text steered at every token.
"""

from __future__ import annotations

import sys

import polars as pl

import headwater as hw
from headwater.act.catalog import act
from headwater.act.strengths import curves

SITE, GOAL = "resid_post.20", "order=ABBA"
METHODS = ("caa", "pca", "probe", "affine")
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)


def main() -> int:
    model = hw.load("smollm2")
    pairs = hw.behavior("ioi", n=72, seed=0)
    actions = [act(method, model, pairs, sites=SITE, goal=GOAL, strengths=(1.0, 2.0)) for method in METHODS]
    found = curves(model, pairs, actions, STRENGTHS)
    with pl.Config(tbl_rows=100, tbl_cols=20, tbl_width_chars=160):
        print(found.tables["curve"].drop("n", "texts"))
    if len(sys.argv) > 1:
        found.chart().save(sys.argv[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
