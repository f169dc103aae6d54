"""Actions beside baselines, three seeds: `python -m benchmarks.act.compare NAME FOLDER [--world RUN]`.

NAME: world_edit, world_unlearn (a run of examples/world.yaml), smol_edit, smol_unlearn, smol_position,
smol_letters, smol_cue (SmolLM2-135M).
FOLDER keeps each cell as it comes; killed, the same command goes on. The comparison is saved to FOLDER/result, its
chart to FOLDER/chart.svg.
"""

import argparse
from pathlib import Path
from typing import Any

import polars as pl
import torch

import headwater as hw
from headwater.act.comparing.comparison import ActComparison, compare
from headwater.behavior.table import Behavior
from headwater.dynamics import TrainingRun

SMOL_FACTS = {"n": 3, "keep": 6, "neighbours": 8, "known": 9}
SMOL = {"steps": 15, "batch": 6, "relearn": (2, 5), "n_others": 6, "text_tokens": 32}
# Rates were chosen once, on seed 9, which no table uses.
WORLD_LORA = {"lr": 5e-3}


def world_edit(run: str, folder: Path) -> ActComparison:
    text, others, corpus = of_world(run, folder)
    actions = {
        "rome": ("rome", {"layer": 0, "corpus": corpus}),
        "memit": ("memit", {"layers": (0,), "corpus": corpus, "limit": 4.0, "preserve": 100.0}),
        "finetune": ("finetune", {"lr": 1e-3}),
        "localized": ("localized", {"lr": 2e-3}),
        "dpo": ("dpo", {"lr": 1e-3}),
    }
    model = last(run)
    return compare(
        model, "fact_edit", actions, options={"n": 6}, lora=WORLD_LORA, text=text, others=others, out=folder,
        relearn_lr=1e-3, text_tokens=24, mechanism=True,
    )  # fmt: skip


def world_unlearn(run: str, folder: Path) -> ActComparison:
    text, others, _ = of_world(run, folder)
    held = {"until": 20.0}  # nats: what is unlikely enough among these words
    actions = {
        "ascent": ("ascent", {"lr": 5e-4, **held}),
        "difference": ("difference", {"lr": 1e-3, **held}),
        "difference output": ("difference", {"weights": "output:1", "lr": 2e-3, **held}),
        "difference lookup": ("difference", {"weights": "lookup:1", "lr": 2e-3, **held}),
        "rmu": ("rmu", {"weights": "all", "lr": 3e-3, "coefficient": 2.0}),
        "rmu output": ("rmu", {"weights": "output:1", "layer": 1, "lr": 3e-3, "coefficient": 2.0}),
        "rmu lookup": ("rmu", {"weights": "lookup:1", "lr": 3e-3, "coefficient": 2.0}),
    }
    model = last(run)
    return compare(
        model, "fact_unlearn", actions, options={"n": 8}, lora=WORLD_LORA, text=text, others=others, out=folder,
        relearn_lr=1e-3, text_tokens=24,
    )  # fmt: skip


def last(run: str) -> Any:
    """The model at the end of a run."""
    held = TrainingRun.open(run)
    return held.load(held.steps[-1])


def of_world(run: str, folder: Path) -> tuple[list[str], list[Behavior], str]:
    """Lines of the world that the model was not trained on, its other relations as behaviors, a file of its text."""
    from headwater.data.world import KINDS, world

    source = world(seed=0)
    text = [source.text(10**9 + i) for i in range(12)]
    corpus = folder / "corpus.txt"
    folder.mkdir(parents=True, exist_ok=True)
    corpus.write_text("\n\n".join(source.text(10**8 + i) for i in range(300)))
    others = []
    for relation in ("language", "continent"):
        facts = source.facts.filter(pl.col("relation") == relation).sort("rank")
        template = KINDS[relation].templates[0]
        rows = []
        for i in range(48):
            one = facts.row(i, named=True)
            other = next(r for r in facts.iter_rows(named=True) if r["object"].split()[0] != one["object"].split()[0])
            alike = facts.filter(pl.col("object") != one["object"])["subject"].to_list()
            prompts = [template.format(x) for x in alike if x.count(" ") == one["subject"].count(" ")][:8]
            rows.append(
                {"prompt": template.format(one["subject"]), "counterfactual": prompts[0], "split": "test",
                 "answers": [f" {one['object']}"], "foils": [f" {other['object']}"]}
            )  # fmt: skip
        others.append(Behavior.from_rows(rows, name=relation))
    return text, others, str(corpus)


def smol_edit(run: str, folder: Path) -> ActComparison:
    actions = {
        "rome": ("rome", {"layer": 10, "steps": 15}),
        "localized": ("localized", {"weights": "lookup:4", "lr": 3e-4}),
        "finetune": ("finetune", {"lr": 5e-5}),
    }
    return compare(hw.load("smollm2"), "fact_edit", actions, options=SMOL_FACTS, out=folder, lora={"lr": 1e-3}, **SMOL)


def smol_unlearn(run: str, folder: Path) -> ActComparison:
    actions = {f"difference {w}": ("difference", {"weights": w, "lr": r}) for w, r in UNLEARNED.items()}
    return compare(
        hw.load("smollm2"), "fact_unlearn", actions, options=SMOL_FACTS, out=folder, lora={"lr": 1e-3}, **SMOL
    )


UNLEARNED = {"all": 2e-5, "output:4": 1e-4, "lookup:4": 1e-4}


def smol_position(run: str, folder: Path) -> ActComparison:
    actions = {
        "gates": ("gates", {}),
        "gates, 20 heads": ("gates", {"top": 20}),
        "repair": ("repair", {"n": 8, "top": 8}),
        "localized": ("localized", {"weights": "lookup:4", "lr": 3e-4}),
        "finetune": ("finetune", {"lr": 5e-5}),
        "dpo": ("dpo", {"lr": 1e-5}),
    }
    options = {"n": 24, "measured": 16}
    settings = SMOL | {"steps": 40}
    return compare(
        hw.load("smollm2"), "position_bias", actions, options=options, out=folder, lora={"lr": 1e-3}, shots=(4,),
        **settings,
    )  # fmt: skip


def smol_letters(run: str, folder: Path) -> ActComparison:
    actions = {"recalibrate": ("recalibrate", {"n": 8}), "localized": ("finetune", {"weights": "output:4", "lr": 2e-4})}
    options = {"n": 16, "measured": 8}
    return compare(
        hw.load("smollm2"),
        "choice_letters",
        actions,
        options=options,
        out=folder,
        lora={"lr": 5e-4},
        shots=(4,),
        **SMOL,
    )


def smol_cue(run: str, folder: Path) -> ActComparison:
    same = {"lr": 5e-5}
    actions = {
        "finetune": ("finetune", same),
        "reweighted": ("reweighted", {**same, "by": "cue"}),
        "reweighted, clusters": ("reweighted", same),
        "cbft": ("cbft", {**same, "cue": "cue=with"}),
    }
    settings = SMOL | {"steps": 30, "batch": 8, "relearn": ()}
    return compare(
        hw.load("smollm2"), "spurious_cue", actions, options={"n": 64, "measured": 16}, out=folder, lora={"lr": 1e-3},
        shots=(4, 8), **settings,
    )  # fmt: skip


ALL = {
    one.__name__: one
    for one in (world_edit, world_unlearn, smol_edit, smol_unlearn, smol_position, smol_letters, smol_cue)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(ALL))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", default="runs/world")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = ALL[given.name](given.world, given.folder)
    found.save(given.folder / "result")
    with pl.Config(tbl_cols=30, tbl_rows=200, fmt_str_lengths=60, tbl_width_chars=260, float_precision=2):
        print(found.wide())
    print(found.verdict)


if __name__ == "__main__":
    main()
