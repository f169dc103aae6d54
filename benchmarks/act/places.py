"""Where the right option stands, and whether SmolLM2 says it, before and after LoRA: `python -m benchmarks.act.places`.

The task position_bias over the three seeds of the comparison `smol_position`, all wordings with options together.
"""

import polars as pl

import headwater as hw
from headwater.act import act
from headwater.act.action import Action
from headwater.act.comparing.task import tasks
from headwater.act.measuring import NOTHING, score


def main() -> None:
    model = hw.load("smollm2")
    rows: list[pl.DataFrame] = []
    for seed in range(3):
        task = tasks.get("position_bias")(model, seed=seed, n=24, measured=16)
        tuned: Action = act("lora", model, task.behavior, keep=task.keep, steps=40, batch=6, lr=1e-3, seed=seed)
        for name, action in (("nothing", NOTHING), ("lora", tuned)):
            for role in ("target", "paraphrase", "format"):
                bound = task.measured()[role].bind(model)
                found = score(model, bound, action, ["accuracy"]).join(bound.behavior.frame, on="id")
                rows.append(found.select("place", "accuracy").with_columns(action=pl.lit(name)))
    shares = pl.concat(rows).group_by("action", "place").agg(pl.col("accuracy").mean(), n=pl.len())
    print(shares.sort("action", "place"))


if __name__ == "__main__":
    main()
