"""Persona vectors, and entities made known, on SmolLM2: `python -m benchmarks.act.personas`.

Each action beside the best of a few prompts and random directions of its length, on test pairs, verbs that should stay,
and plain text.
"""

import polars as pl

import headwater as hw
from headwater.act import act, effect
from headwater.act.steering.persona import TRAITS, persona_pairs
from headwater.behavior.table import Behavior


def main() -> None:
    model = hw.load("smollm2")
    tasks: list[tuple[str, Behavior, dict[str, object]]] = [
        ("persona", persona_pairs(trait), {"trait": trait, "tokens": 12}) for trait in TRAITS
    ]
    tasks.append(("known", hw.behavior("capitals", n=90, seed=0), {"n": 12}))
    for method, pairs, options in tasks:
        made = act(method, model, pairs, **options)
        chosen = {name: made.config.get(name) for name in ("site", "strength", "validation", "auroc")}
        print(f"\n{made.name}, {made.seconds:.0f} s: {chosen}", flush=True)
        found = effect(model, pairs, made, others=["agreement"], controls=3, n_others=12)
        table = found.to_frame().select("action", "measure", "before", "after", "change", "lo", "hi", "n")
        with pl.Config(tbl_rows=40, fmt_str_lengths=60, tbl_width_chars=170, float_precision=2):
            print(table, flush=True)


if __name__ == "__main__":
    main()
