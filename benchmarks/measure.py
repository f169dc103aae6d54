"""How everything is measured: CPU time over interleaved rounds, peak memory in a process of its own, with spread."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which torch and its friends do
import torch

Job = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def cpu_seconds(job: Job, repeats: int = 1) -> float:
    """CPU seconds of one call, over all threads of this process; garbage of earlier jobs is not this job's cost."""
    gc.collect()
    gc.disable()
    start = time.process_time()
    for _ in range(repeats):
        job()
    spent = time.process_time() - start
    gc.enable()
    return spent / repeats


def interleaved(jobs: Mapping[str, Job], rounds: int, *, repeats: int = 1, warm: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each job in each round. A round runs every job once, in an order that turns, so that a machine
    that gets slower or busier does so for all of them."""
    for job in jobs.values():
        for _ in range(warm):
            job()
    names = list(jobs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(cpu_seconds(jobs[name], repeats))
    return found


def ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Spread]:
    """Each job's time against the base's of the same round."""
    return {
        name: Spread.of([own / bare for own, bare in zip(spent, times[base], strict=True)])
        for name, spent in times.items()
    }


def peak_mb(module: str, what: str, **environment: str) -> float | None:
    """Peak resident memory of a process that runs `python -m MODULE --only WHAT` and nothing else; None if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--only", what],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("peak MB "):
            return float(line.removeprefix("peak MB "))
    print(f"  (no peak of {what}: {done.stderr.strip().splitlines()[-1:]})")
    return None


def print_peak() -> None:
    """The largest resident memory that this process has had. Linux hands ru_maxrss on from the parent through exec, so
    there it is read where the kernel keeps it for this program."""
    status = Path("/proc/self/status")
    if status.exists():
        high = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak = int(high.split()[1]) / 2**10
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(f"peak MB {peak:.0f}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as Markdown, so that it goes into the page as it is."""
    cells = [[str(c) for c in columns], *[["" if c is None else str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print(flush=True)


def bar(name: str, value: float, wanted: float, *, at_least: bool = False) -> None:
    """Say whether a bar is reached."""
    reached = value >= wanted if at_least else value <= wanted
    sign = "at least" if at_least else "at most"
    print(f"bar: {name}: {value:.3g}, wanted {sign} {wanted:g}: {'reached' if reached else 'NOT reached'}", flush=True)


def installed(*packages: str) -> bool:
    """Whether a peer is there; says so where it is not."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install 'headwater[bench]')")
    return not missing


def begin(title: str, threads: int) -> argparse.Namespace:
    """Set the threads, quieten the libraries, say what is measured on what, and read the command line."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "--rounds", type=int, default=None, help="interleaved rounds (each benchmark has its own default)"
    )
    parser.add_argument("--only", default=None, help="run one job once and print this process's peak memory")
    parser.add_argument("--parts", nargs="*", default=None, help="only these parts of a benchmark that has several")
    parser.add_argument("--threads", type=int, default=threads, help="threads of torch (peaks are of one thread)")
    arguments, _ = parser.parse_known_args()
    threads = arguments.threads
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import logging

    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if arguments.only is None:
        versions = []
        for name in ("torch", "transformers", "nnsight", "transformer-lens"):
            try:
                versions.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                versions.append(f"{name} absent")
        print(f"# {title}")
        print(
            f"{date.today().isoformat()}, {os.cpu_count()} CPU cores ({platform.machine()}), {threads} thread(s), "
            f"load {os.getloadavg()[0]:.1f} at the start; {', '.join(versions)}",
            flush=True,
        )
    return arguments
