"""`python -m benchmarks`: every benchmark in turn, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("import_time", "fixed_cost", "reach", "localize.circuits", "localize.growth", "localize.real", "data.counts")


def main() -> int:
    failed = []
    for name in NAMES:
        print(f"\n{'=' * 20} {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
