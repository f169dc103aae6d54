"""The whole of a circuit hunt on real models: EAP-IG with 5 steps on 100 IOI pairs, then its CPR/CMD curve.

Wall and CPU seconds on all cores, as a user would run it; the floor is the same passes on the bare model.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks import measure

PAIRS, STEPS = 100, 5
MODELS = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}


def hunt(name: str) -> list[list[str]]:
    import headwater as hw

    model = hw.load(name)
    behavior = hw.behavior("ioi", n=2 * PAIRS, seed=0)
    rows, scores = [], None
    for split, job in (("train", "EAP-IG, 5 steps"), ("test", "curve of 10 sizes")):
        asked = behavior.train if split == "train" else behavior.test
        part = asked[:PAIRS]
        wall, cpu = time.perf_counter(), time.process_time()
        if scores is None:
            scores = hw.localize.eap_ig(model, part, steps=STEPS)
            n, said = scores.facts["n"], f"{scores.graph.n_edges:,} edges"
        else:
            curve = scores.curve(part)
            n, said = curve.facts["n"], f"CPR {curve.facts['cpr']:.3f}, CMD {curve.facts['cmd']:.3f}"
        spent = time.perf_counter() - wall, time.process_time() - cpu
        rows.append([MODELS[name], job, str(n), f"{spent[0]:.0f}", f"{spent[1]:.0f}", said])
    return rows


def main() -> None:
    arguments = measure.begin("Circuit hunt on real models", threads=os.cpu_count() or 1)
    if arguments.only:
        hunt(arguments.only)
        measure.print_peak()
        return
    rows = [row for name in MODELS for row in hunt(name)]
    measure.table(
        f"IOI, up to {PAIRS} pairs a split, all cores", ["model", "job", "pairs", "wall s", "CPU s", "found"], rows
    )


if __name__ == "__main__":
    sys.exit(main())
