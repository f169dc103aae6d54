"""Capitals rewritten in SmolLM2 by ROME and MEMIT: `python -m benchmarks.act.facts [CORPUS.txt [FOLDER [METHOD]]]`.

Four facts a seed; the wording that was trained on (efficacy), three others (paraphrase), and two neighbors a fact
(specificity), with perplexity of plain text, beside random changes of the same size and few-shot prompting. Each edit
is taken off, and the weights are compared bit by bit. CORPUS is what key moments are taken over, kept in headwater's
cache. Effects are saved into FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
import torch

import headwater as hw
from headwater.act import effect
from headwater.act.catalog import act
from headwater.act.editing.rewrites import rewrites

TOKENS = 3_000


def main() -> int:
    corpus = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    model = hw.load("smollm2")
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    made = rewrites(4, seed=0)
    rows = []
    for method in sys.argv[3:] or ("rome", "memit"):
        action = act(method, model, made["facts"], corpus=corpus, corpus_tokens=TOKENS)
        stay = [made["written"], made["neighbors"]]
        found = effect(model, made["facts"], action, others=stay, controls=1, prompting=method == "rome")
        if folder is not None:
            found.save(folder / method)
        same = all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
        print(f"{action.name}: {action.seconds:.0f} s to find, off again to the bit: {same}", flush=True)
        rows.append(found.to_frame().select("action", "measure", "before", "after", "change", "lo", "hi", "n"))
        print(found.facts["costs"], flush=True)
    with pl.Config(tbl_rows=100, fmt_str_lengths=70, tbl_width_chars=160):
        print(pl.concat(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
