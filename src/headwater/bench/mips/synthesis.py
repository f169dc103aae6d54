"""MIPS: program synthesis from recurrent networks, task by task, with an honest account of what was not found."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from headwater.bench.mips.program import Synthesis, synthesize
from headwater.bench.mips.rnn import Architecture, Network, linear_enough, train
from headwater.bench.mips.tasks import Task, tasks
from headwater.bench.programs.source import load_function
from headwater.core.errors import MethodError, StoreError
from headwater.core.files import read_json, to_json, write_whole
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result


@dataclass(frozen=True, kw_only=True)
class MipsConfig:
    """How hard to look.

    seeds: random starts of each architecture. networks: at most so many trained a task. iterations: of one training.
    error: the largest output error of a network that counts as trained. held_out: fresh sequences of the training
    length that a program is judged on, beside half as many of three times that length; as many again confirm the one
    program that passes. seed: shifts all random starts.
    """

    seeds: int = 4
    networks: int = 64
    iterations: int = 100
    error: float = 0.3
    held_out: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds", "networks", "iterations", "held_out"):
            if getattr(self, name) < 1:
                raise MethodError(f"MipsConfig.{name} is too small", got=getattr(self, name), wanted="at least 1")
        if not 0 < self.error < 0.5:
            raise MethodError("MipsConfig.error does not fit", got=self.error, wanted="more than 0, less than 0.5")


@register_result
class Mips(Result):
    """What program synthesis made of each task.

    tables: `tasks`: task, about, solved, form (the least simple kind of formula in the program; "table": its rule is
    listed, not put into a formula), route (see `Synthesis`), states, lines, network (the one the program was read off,
    or the best), weights, networks (trained for this task), error (the network's largest on fresh sequences), held_out
    and longer (shares of fresh sequences that the program got right at every position; of a solved task on sequences
    that had no part in choosing it), why (it is not solved). facts: n, solved, sources {task: program}.
    """

    kind: ClassVar[str] = "mips"
    main: ClassVar[str | None] = "tasks"

    def source(self, task: str) -> str:
        """The Python program found for a task. Raises MethodError where none was."""
        found = self.facts["sources"].get(task)
        if found is None:
            raise MethodError("no program was found for this task", got=task, wanted=", ".join(self.facts["sources"]))
        return found

    def program(self, task: str) -> Callable[..., Any]:
        """That program as a function of a list of inputs."""
        return load_function(self.source(task), "program")


def mips(
    names: str | Iterable[str] | None = None,
    *,
    config: MipsConfig | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Mips:
    """Train a network on each task and turn it into a Python program, checked on fresh and on longer sequences.

    After Michaud et al. (2024): the smallest network that learns the task; its hidden states as integers (a lattice)
    or as a finite-state machine; regression of update and output to formulas. names: tasks (all 62). A task is solved
    where the program is right on every fresh sequence, those three times as long included. Networks differ from the
    published ones: they are trained by Levenberg-Marquardt, and machines by a second-order network (a matrix for each
    letter). out: a folder that keeps each task's outcome as it is found; given again, those are not run again. Raises
    MethodError for an unknown task or option, StoreError for a folder that holds the outcomes of another config.

    Known failure: states that are neither few nor moved by an affine, piecewise or modular formula (majority,
    palindromes), and tasks whose smallest network Levenberg-Marquardt does not find; the formulas tried were chosen
    knowing these 62 tasks, so that the share solved says little of others.
    """
    from headwater.localize.attribution.eap import configured

    chosen = configured(MipsConfig, config, options)
    wanted = tasks.names() if names is None else [names] if isinstance(names, str) else list(names)
    known = [tasks.get(name) for name in wanted]
    began = time.perf_counter()
    folder = None if out is None else _folder(Path(out), chosen)
    rows: list[dict[str, Any]] = []
    sources: dict[str, str] = {}
    for task in track(known, "tasks"):
        stored = None if folder is None else folder / f"{task.name}.json"
        if stored is not None and stored.exists():
            found = read_json(stored, what=f"the outcome of {task.name}")
            row, source = found["row"], found["source"]
        else:
            row, source = solve(task, chosen)
            if stored is not None:
                write_whole(stored, to_json({"row": row, "source": source}).encode())
        rows.append(row)
        if source is not None:
            sources[task.name] = source
    frame = pl.DataFrame(rows, schema=_SCHEMA)
    return Mips(
        tables={"tasks": frame},
        facts={"n": len(rows), "solved": int(frame["solved"].sum()), "sources": sources},
        config={**asdict(chosen), "tasks": wanted},
        provenance=Provenance.collect(seed=chosen.seed, seconds=time.perf_counter() - began),
    )


def _folder(path: Path, config: MipsConfig) -> Path:
    """The folder of outcomes, made if need be; those of another config are not mixed in."""
    path.mkdir(parents=True, exist_ok=True)
    marker = path / "config.json"
    text = to_json(asdict(config))
    if not marker.exists():
        write_whole(marker, text.encode())
    elif to_json(read_json(marker, what="the config of these outcomes")) != text:
        raise StoreError(
            f"{path} holds outcomes of another config",
            got=marker.read_text(encoding="utf-8"),
            fix="Take another folder",
        )
    return path


_SCHEMA = {
    "task": pl.String, "about": pl.String, "solved": pl.Boolean, "form": pl.String, "route": pl.String,
    "states": pl.Int64, "lines": pl.Int64, "network": pl.String, "weights": pl.Int64, "networks": pl.Int64,
    "error": pl.Float64, "held_out": pl.Float64, "longer": pl.Float64, "why": pl.String,
}  # fmt: skip


def solve(task: Task, config: MipsConfig) -> tuple[dict[str, Any], str | None]:
    """One task: (its row of the table, the program or None)."""
    best: Network | None = None
    closest: tuple[Synthesis, Network, tuple[float, float]] | None = None
    trained = 0
    for arch, seed in _plan(task, config):
        if trained == config.networks:
            break
        trained += 1
        network = train(task, arch, seed=config.seed + seed, iterations=config.iterations)
        if best is None or network.error < best.error:
            best = network
        if network.error > config.error:
            continue
        for found in synthesize(network):
            shares = judge(task, found.source, config)
            if closest is None or sum(shares) > sum(closest[2]):
                closest = (found, network, shares)
            if shares == (1.0, 1.0):
                # What was chosen by these sequences is confirmed on others, once.
                again = judge(task, found.source, config, confirm=True)
                why = "" if again == (1.0, 1.0) else "right where it was chosen, but not on the sequences after that"
                return _row(task, network, trained, found, again, why), found.source if not why else None
    if best is None or best.error > config.error:
        return _row(task, best, trained, None, None, "no network learned the task"), None
    if closest is None:
        why = "learned, but its states are neither integers nor few, or no formula holds"
        return _row(task, best, trained, None, None, why), None
    why = "the program found is not right on all fresh sequences"
    return _row(task, closest[1], trained, closest[0], closest[2], why), None


def judge(task: Task, source: str, config: MipsConfig, *, confirm: bool = False) -> tuple[float, float]:
    """Shares of fresh sequences with every output right: of the task's length, and of three times that.

    confirm: on sequences that no program is chosen by.
    """
    program = load_function(source, "program")
    shares = []
    first = 7000 if confirm else 5000
    sizes = ((task.length, config.held_out, first), (3 * task.length, config.held_out // 2 + 1, first + 1000))
    for length, n, seed in sizes:
        xs, ys = task.sample(n, length=length, seed=config.seed + seed)
        right = [
            _said(program, x, task.width) == (y[:, 0].tolist() if task.outputs == 1 else [tuple(r) for r in y.tolist()])
            for x, y in zip(xs, ys, strict=True)
        ]
        shares.append(float(np.mean(right)))
    return shares[0], shares[1]


def _said(program: Callable[..., Any], x: np.ndarray[Any, Any], width: int) -> Any:
    try:
        return program(x[:, 0].tolist() if width == 1 else [tuple(row) for row in x.tolist()])
    except (KeyError, OverflowError):  # a table without that row: the program is wrong here
        return None


def _plan(task: Task, config: MipsConfig) -> Iterator[tuple[Architecture, int]]:
    """Architectures from small to large, each from several starts."""
    seeds = range(config.seeds)
    if linear_enough(task):
        yield from ((Architecture(hidden=h), seed) for h in range(1, 10) for seed in seeds)
        return
    letters = len(task.alphabet)

    def bilinear(*sizes: int, most: int = 600) -> list[Architecture]:
        return [Architecture(hidden=h, update="bilinear") for h in sizes if letters * h * h <= most]

    shapes = bilinear(2, 3, 4)
    shapes += [Architecture(hidden=h, readout=r) for h, r in ((1, 2), (1, 4), (2, 2), (2, 6))]
    if letters <= 20:
        shapes += [Architecture(hidden=h, embedded=True, readout=r) for h, r in ((1, 0), (2, 0))]
    shapes += bilinear(5, 6, 7, 8)
    shapes += [Architecture(hidden=1, update="mlp", width=w, readout=r) for w, r in ((2, 0), (3, 0), (4, 2))]
    shapes += [Architecture(hidden=2, update="mlp", width=w, readout=r) for w, r in ((4, 0), (8, 4))]
    # Room to spare helps where the smallest network has only bad minima: larger matrices, last.
    shapes += [arch for arch in bilinear(5, 9, 10, most=1300) if arch not in shapes]
    # Two starts of every shape before the third of any: most tasks that can be learned are learned early.
    for first in range(0, config.seeds, 2):
        yield from ((arch, seed) for arch in shapes for seed in seeds[first : first + 2])


def _row(
    task: Task, network: Network | None, trained: int, found: Synthesis | None, shares: tuple[float, float] | None,
    why: str,
) -> dict[str, Any]:  # fmt: skip
    return {
        "task": task.name,
        "about": task.about,
        "solved": not why,
        "form": found.form if found else None,
        "route": found.route if found else None,
        "states": found.states if found else None,
        "lines": found.source.count("\n") if found else None,
        "network": str(network.arch) if network else None,
        "weights": sum(one.numel() for one in network.weights.values()) if network else None,
        "networks": trained,
        "error": network.error if network and np.isfinite(network.error) else None,
        "held_out": shares[0] if shares else None,
        "longer": shares[1] if shares else None,
        "why": why,
    }
