"""train: a small model from scratch, from a file of settings."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwater.cli.options import Json
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows

if TYPE_CHECKING:
    from headwater.dynamics.lab.run import TrainingRun


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(train)


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings; docs/dynamics.md lists them.")],
    out: Annotated[Path, typer.Option(help="The run's folder; made if needed, gone on with if it exists.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, as NAME=VALUE with dots within (model.n_layers=3); may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Train a small model from scratch, so that every step and every batch can be looked at again.

    Interrupted or killed, the same command goes on to the same weights. On several processes:
    torchrun --nproc-per-node 2 -m headwater train CONFIG.yaml --out RUN
    """
    from headwater.dynamics.lab.config import TrainConfig
    from headwater.dynamics.lab.training import train as run_training

    settings = TrainConfig.from_yaml(config, **settings_of(option, dotted=True))
    try:
        run = run_training(settings, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("What was saved is whole; the same command goes on from there.") from None
    _finish(run, json)


def _finish(run: "TrainingRun", json: bool) -> None:
    import os

    if os.environ.get("RANK", "0") != "0":
        return  # one process speaks for all
    result = run.result
    facts = {**result.facts, "folder": str(run.path)}
    last = result.tables["validation"].tail(len(run.config.validation)).to_dicts() if run.config.validation else []
    if json:
        show_json({**facts, "validation": last})
        return
    show(f"{facts['name']}: {facts['steps']} steps, {facts['parameters']} parameters, {facts['tokens']} tokens")
    show(f"loss of the last batch: {facts['loss']:.4g}")
    if last:
        show_rows(last, as_json=False)
    show(f"{len(facts['checkpoints'])} checkpoints in {run.path}")
