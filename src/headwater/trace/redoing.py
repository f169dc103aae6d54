"""The do_data stage: the same training once more on other data, and whether what the model knows follows.

Either the frequencies of a world's facts are dealt out anew (`permute`), or what states half of the facts is taken out
(`remove`); all else of the run stays as it is. The second run lies in the trace's folder, its checkpoints known by
hash: what is measured of it can be measured again without training.
"""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from headwater.core.errors import MethodError, StoreError
from headwater.core.results import Result
from headwater.data.knowing import fact_change
from headwater.localize.comparing.heads import metric_values
from headwater.trace.history import History
from headwater.trace.reading import counted, fact_table, facts_of, relations_measured, variables

if TYPE_CHECKING:
    from headwater.core.model import Model
    from headwater.dynamics.lab.run import TrainingRun
    from headwater.trace.stages import Made, Work

_WORTH_IT = 30.0  # seconds of training from which on a second process begins it while other stages run
_PATIENCE = 60.0  # seconds to wait for a process that is about to end


def do_data(work: "Work") -> "Made":
    """Train again, count and measure again, and hold both changes against each other."""
    from headwater.trace.stages import Made

    named = variables(work)
    if named is None:
        return Made({}, {"skipped": work.run.facts("data").get("skipped") or "there are no facts to change"})
    wait_for(work)
    run = trained_again(work)
    facts: dict[str, Any] = {
        "how": how(work), "checkpoints": {str(step): run.note(step)["sha256"] for step in run.steps},
    }  # fmt: skip
    if facts["how"] == "remove":
        facts["removed"] = [list(pair) for pair in removed(work)]
    return Made(measured(work, run), facts)


def measured(work: "Work", run: "TrainingRun") -> dict[str, Result]:
    """What is measured of the second run, beside the first."""
    facts, parts = facts_of(work, _named(work)), work.folder("do_data") / "parts"
    again = History(series=of_steps(run, work.history.series.steps), run=run, settings=work.settings)
    from headwater.data.corpus import Corpus

    counts = counted(work, Corpus.open(str(run.path)), facts, parts / "counts")
    formation = answers(work, again, parts / "answers")
    after = fact_table(facts, counts, formation)
    first: Any = work.result("data", "counts")
    before = fact_table(facts, first, work.result("timeline", "formation"))
    settings = work.settings.data
    change = fact_change(before, after, draws=settings.draws, seed=work.seed("do_data"))
    return {"counts": counts, "change": change, **relations_changed(work, run, parts)}


def relations_changed(work: "Work", run: "TrainingRun", parts: Path) -> dict[str, Result]:
    """Of a world: what became of the linear mechanisms of its relations."""
    if "strengths" not in work.run.hashes().get("data", {}):
        return {}
    from headwater.data.link_worlds import compare_worlds

    strengths, counts = relations_measured(work, run, parts)
    first: Any = work.result("data", "strengths")
    read: Any = work.result("data", "relation_counts")
    worlds = compare_worlds(first, read, strengths, counts, draws=work.settings.data.draws, seed=work.seed("worlds"))
    return {"relation_counts": counts, "strengths": strengths, "worlds": worlds}


def answers(work: "Work", history: History, folder: Path) -> Result:
    """Of each pair at each checkpoint of the second run, whether its answer is the likeliest token."""
    settings = work.settings.timeline
    pairs = type(work.behavior)(
        pl.concat([work.train(settings.n).frame, work.test(settings.n).frame]), name=work.behavior.name,
        metric=work.behavior.metric,
    )  # fmt: skip

    def known(checkpoint: "Model") -> dict[str, torch.Tensor]:
        bound = pairs.bind(checkpoint)
        out = torch.empty(pairs.n, dtype=torch.float64)
        rows = torch.tensor([row for group in bound.groups for row in group.rows])
        out[rows] = (metric_values(checkpoint, bound, metric="rank") == 0).double()
        return {"known": out}

    kept = history.measured(folder, "asking the second run", known, {"pairs": pairs.hash})
    ids, splits = pairs.frame["id"].to_list(), pairs.frame["split"].to_list()
    table = pl.concat([
        pl.DataFrame({
            "step": [step] * len(ids), "id": ids, "split": splits, "known": values["known"].bool().tolist()
        })
        for step, values in sorted(kept.items())
    ])  # fmt: skip
    return Result(tables={"pairs": table})


# --- the second run


def how(work: "Work") -> str:
    """What is done to the data."""
    asked, run = work.settings.do_data.how, work.history.run
    if asked != "auto" or run is None:
        return asked
    return "permute" if any(one.source == "world" for one in run.config.data) else "remove"


def removed(work: "Work") -> list[tuple[str, str]]:
    """The facts that are taken out: a share of all, by chance."""
    table = facts_of(work, _named(work)).select("subject", "object").unique(maintain_order=True).rows()
    chance = random.Random(_seed(work))
    n = max(1, round(work.settings.do_data.share * len(table)))
    return sorted(chance.sample(table, min(n, len(table))))


def _named(work: "Work") -> tuple[str, str]:
    """The variables of the facts that are changed. Raises MethodError where there are none."""
    named = variables(work)
    if named is None:
        raise MethodError(f"{work.behavior.name} has no facts to change", fix="Set data.variables")
    return named


def _seed(work: "Work") -> int:
    own = work.settings.do_data.seed
    return work.seed("do_data") if own is None else own


def folder(work: "Work") -> Path:
    """Where the second run lies: in the trace's own folder, whatever is measured anew elsewhere."""
    return work.run.path / "work" / "do_data" / "run"


def trained_again(work: "Work") -> "TrainingRun":
    """The second run: trained, gone on with, or as it is there."""
    from headwater.dynamics.lab.redo import redo

    run, out = work.history.run, folder(work)
    if run is None:
        raise StoreError("only a run of `headwater train` can be trained once more", got=work.settings.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    change: dict[str, Any] = {}
    if how(work) == "permute":
        if not any(one.source == "world" for one in run.config.data):
            raise MethodError("only a world's frequencies can be dealt out anew", fix="Set do_data.how: remove")
        change["data"] = {"world": {"permute": _seed(work) % 2**31}}
    else:
        change["remove"] = removed(work)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return redo(run, out, **change)
        except StoreError as error:  # the second process of a trace that was killed a moment ago
            if "another process writes" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def checked_run(work: "Work") -> "TrainingRun":
    """The second run of a stored stage. Raises StoreError where a checkpoint is not the one that was measured."""
    from headwater.dynamics.lab.run import TrainingRun, weights_hash

    run, known = TrainingRun.open(folder(work)), work.run.facts("do_data")["checkpoints"]
    for step, wanted in known.items():
        found = weights_hash(run.folder(int(step)))
        if found != wanted:
            raise StoreError(
                f"a checkpoint in {run.path} is not the one that was measured", got=f"step {step}: {found[:12]}",
                wanted=wanted[:12], fix="Remove the stage do_data and `headwater resume`",
            )  # fmt: skip
    return run


def of_steps(run: "TrainingRun", steps: list[int]) -> Any:
    """The second run's checkpoints of these steps."""
    from headwater.dynamics.series import CheckpointSeries

    series = CheckpointSeries.of(run)
    return series.select([step for step in steps if step in series.steps])


# --- a second process


def begin(work: "Work") -> "subprocess.Popen[bytes] | None":
    """Begin the second run in a process of its own, beside the stages that do not need it, where that is worth it.

    What it trains is the same wherever it is trained. It ends when this process ends, however that ends.
    """
    from headwater.dynamics.lab.run import TrainingRun

    run = work.history.run
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if run is None or cores < 2 or (run.result.provenance.seconds or 0.0) < _WORTH_IT:
        return None
    out = folder(work)
    if (out / "train.json").exists() and TrainingRun.open(out).finished:
        return None
    command = [sys.executable, "-m", "headwater.trace.redoing", str(work.run.path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(work: "Work") -> None:
    """Wait for the second process; whatever it left undone is done here."""
    if work.beside is not None:
        work.beside.wait()
        end(work)


def end(work: "Work") -> None:
    """End the second process: closing its input is the sign."""
    if work.beside is not None:
        if work.beside.stdin is not None:
            work.beside.stdin.close()
        work.beside.wait()
        work.beside = None


def _main(run_folder: str) -> None:
    """The second process: trains until it is done, or its input is closed."""
    from headwater.core.store import RunFolder
    from headwater.trace.investigation import Investigation
    from headwater.trace.stages import Work

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    run = RunFolder.open(run_folder)
    settings = Investigation(**{**run.config, "out": run_folder})
    trained_again(Work(settings, run, settings._loader(None)))


if __name__ == "__main__":
    _main(sys.argv[1])
