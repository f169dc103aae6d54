"""Trained models with a known mechanism: train one by name, store it, load it again."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.bench.siit.alignment import Alignment
from headwater.bench.siit.checks import SiitReport, check
from headwater.bench.siit.config import SiitConfig, configs
from headwater.bench.siit.training import STATE, Task, Training, another_run, causal_graph
from headwater.bench.siit.truth import name_truth, pairs
from headwater.core.errors import StoreError
from headwater.core.files import clean_leftovers, store_error
from headwater.core.results import load_result
from headwater.localize.catalog import fitted

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.bench.mechanism import TrueMechanism
    from headwater.bench.siit.causal import CausalGraph
    from headwater.core.model import Model


@dataclass(eq=False, kw_only=True)
class Siit:
    """A transformer, the causal graph that it was trained to compute, and how well it does.

    history: the losses and checks of its training, a row a check.
    """

    name: str
    config: SiitConfig
    task: Task
    mechanism: "TrueMechanism"
    report: SiitReport
    history: list[dict[str, float]]

    @property
    def model(self) -> "Model":
        return self.task.model

    @property
    def causal(self) -> "CausalGraph":
        return self.task.causal

    @property
    def alignment(self) -> Alignment:
        return self.task.alignment

    def behavior(self, n: int = 64, *, seed: int = 0, near: float = 0.5) -> "Behavior":
        """Minimal pairs whose answers at the last position differ: see `truth.pairs`."""
        return pairs(self.causal, n, seed=seed, name=self.name, near=near)

    def check(self, *, n: int = 1000, seed: int = 1) -> SiitReport:
        """The checks anew, on other inputs."""
        return check(self.task, n=n, seed=seed, config=self.config)

    def save(self, folder: str | Path) -> Path:
        """Write model, tokenizer, mechanism and report: `headwater.load(folder)` reads the model, `siit.load` all of
        it.

        `mechanism/` is the TrueMechanism, `mechanism.json` its circuit in the JSON form of MIB submissions, `report/`
        the checks, `behavior.parquet` pairs, `siit.json` the config; that one comes last, so a folder that has it is
        whole.
        """
        from headwater.core.files import to_json, write_bytes
        from headwater.core.loading_hf import calm

        path = Path(folder)
        with calm():
            self.model.hf.save_pretrained(path)
            self.model.tokenizer.save_pretrained(path)
        self.mechanism.save(path / "mechanism")
        self.mechanism.circuit().to_json(path / "mechanism.json")
        self.report.save(path / "report")
        self.behavior(200).save(path / "behavior.parquet")
        head = {
            "name": self.name,
            "config": asdict(self.config),
            "alignment": self.alignment.to_list(),
            "history": self.history,
        }
        write_bytes(path / "siit.json", to_json(head).encode())
        return path


def train(
    name: str | SiitConfig,
    *,
    out: str | Path | None = None,
    alignment: Alignment | None = None,
    checks: int = 1000,
    **options: Any,
) -> Siit:
    """Train a config of the registry (or one of your own) by strict interchange-intervention training (Gupta et al.,
    2024) until its checks pass or its steps are used up.

    out: where it is stored. A run that was stopped goes on from its last check, to the same weights as if it had not
    been; one that is done is loaded; one process at a time. alignment: other nodes for the variables than `align`
    gives. checks: inputs of the final report. options: fields of SiitConfig to change. Whether the checks passed stands
    in `report.facts["passed"]`: nothing is raised where they did not. Raises StoreError for the folder of another
    config.

    Known failure: nothing says that a head found another way than by what the interchange shows: a variable's head may
    carry other things too, as long as they have no effect.
    """
    config = configs.get(name) if isinstance(name, str) else name
    config = fitted(SiitConfig, {**asdict(config), **options}) if options else config
    label = name if isinstance(name, str) else config.graph
    run = Training(config, name=f"siit-{label}", alignment=alignment)
    folder = None if out is None else Path(out)
    if folder is not None and (folder / "siit.json").exists():
        return _same(load(folder), run)
    if folder is not None:
        _make(folder)
        clean_leftovers(folder)
        run.resume(folder)
    run.run(folder)
    run.finish()
    report = check(run.task, n=checks, config=config)
    report.provenance = replace(report.provenance, seconds=run.seconds)
    found = Siit(
        name=label,
        config=config,
        task=run.task,
        mechanism=name_truth(run.task, config, name=f"siit-{label}"),
        report=report,
        history=run.history,
    )
    if folder is not None:
        found.save(folder)
        shutil.rmtree(folder / STATE, ignore_errors=True)
    return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store_error(error, folder, "write") from error


def _same(done: Siit, run: Training) -> Siit:
    """What is stored, where it is what `run` would have made."""
    if done.config != run.config or done.alignment != run.task.alignment:
        raise another_run(done.name, done.config, run.config)
    return done


def load(folder: str | Path) -> Siit:
    """What `train(..., out=folder)` stored. Raises StoreError for a folder without it."""
    from headwater.bench.mechanism import TrueMechanism
    from headwater.core.files import read_json
    from headwater.core.loading import load as load_model

    path = Path(folder)
    head: Mapping[str, Any] = read_json(path / "siit.json", what="siit.json of a trained model")
    config = fitted(SiitConfig, head.get("config") or {})
    mechanism, report = load_result(path / "mechanism"), load_result(path / "report")
    if not isinstance(mechanism, TrueMechanism) or not isinstance(report, SiitReport):
        raise StoreError(f"{folder} holds no trained model with its mechanism", got=f"{mechanism.kind}, {report.kind}")
    alignment = Alignment.from_list(head.get("alignment") or ())
    return Siit(
        name=str(head.get("name")),
        config=config,
        task=Task(causal_graph(config), load_model(path), alignment),
        mechanism=mechanism,
        report=report,
        history=list(head.get("history") or ()),
    )
