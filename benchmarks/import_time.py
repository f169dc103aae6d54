"""What importing headwater costs beyond torch and transformers, which a user of either has imported already.

CPU time inside fresh processes: `import headwater` alone (lazy, so neither is imported), then its parts after torch and
transformers.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import measure

LINES = {
    "import headwater": ("", "import headwater"),
    "torch and transformers' model classes": (
        "",
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer",
    ),
    "headwater, beyond them": ("both", "import headwater"),
    "headwater.load and Model, beyond them": (
        "both",
        "import headwater; headwater.load, headwater.Model, headwater.Intervention",
    ),
    "nnsight, beyond them": ("both", "import nnsight"),
    "transformer-lens, beyond them": ("both", "import transformer_lens"),
}
BOTH = (
    "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, AttentionInterface, GenerationConfig"
)


def seconds(before: str, line: str) -> float:
    timed = ["import time", "start = time.process_time()", line, "print('CPU', time.process_time() - start)"]
    code = "\n".join([BOTH, *timed] if before else timed)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(next(x for x in done.stdout.splitlines() if x.startswith("CPU ")).removeprefix("CPU "))


def main() -> None:
    arguments = measure.begin("Import", threads=1)
    rounds = arguments.rounds or 5
    lines = dict(LINES)
    for name, package in (("nnsight, beyond them", "nnsight"), ("transformer-lens, beyond them", "transformer_lens")):
        if not measure.installed(package):
            lines.pop(name)
    for line in lines.values():
        seconds(*line)  # compile and cache what is not yet
    found: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, line in lines.items():
            found[name].append(seconds(*line))
    spread = {name: measure.Spread.of(values) for name, values in found.items()}
    measure.table(
        f"CPU seconds of an import, median (min to max) of {rounds} fresh processes",
        ["", "CPU s"],
        [[name, value.text(3)] for name, value in spread.items()],
    )
    measure.bar(
        "headwater beyond torch and transformers, s", spread["headwater.load and Model, beyond them"].median, 0.1
    )


if __name__ == "__main__":
    sys.exit(main())
