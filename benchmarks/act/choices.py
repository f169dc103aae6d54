"""Position bias in multiple choice on SmolLM2, against `recalibrate` and `repair`: `python -m benchmarks.act.choices`.

Colors of things, four options labelled A to D, each place right equally often. Accuracy by place before and after, on
test pairs; other behaviors and plain text beside it.
"""

from __future__ import annotations

import polars as pl

import headwater as hw
from headwater.act import effect
from headwater.act.action import Action
from headwater.act.catalog import act
from headwater.act.measuring import NOTHING, score

METHODS = {"recalibrate": {"strengths": (0.5, 1.0), "top": 12}, "repair": {"strengths": (1.5, 2.0), "top": 6}}


def by_place(model: hw.Model, pairs: hw.Behavior, action: Action) -> pl.DataFrame:
    bound = pairs.test.bind(model)
    found = score(model, bound, action, ["accuracy"]).join(bound.behavior.frame.select("id", "place"), on="id")
    return found.group_by("place").agg(pl.col("accuracy").mean(), n=pl.len()).sort("place")


def main() -> int:
    model = hw.load("smollm2")
    pairs = hw.behavior("colors", n=384, seed=0, format="choice")
    frame = pairs.frame.filter(labels="A-D")
    train, test = (frame.filter(split=split) for split in ("train", "test"))
    pairs = hw.Behavior(pl.concat([train.head(48), test.head(48)]), name="choices", metric=pairs.metric)
    print(by_place(model, pairs, NOTHING).rows(), flush=True)
    for method, options in METHODS.items():
        action = act(method, model, pairs, n=12, max_perplexity=1.2, **options)
        print(action.name, action.config.get("parts") or action.config.get("heads"), f"{action.seconds:.0f} s")
        print(by_place(model, pairs, action).rows(), flush=True)
        found = effect(model, pairs, action, controls=1, prompting=method == "recalibrate", n_others=12)
        with pl.Config(tbl_rows=40, fmt_str_lengths=60, tbl_width_chars=150):
            print(found.to_frame().select("action", "measure", "before", "after", "lo", "hi", "n"), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
