"""redo: a training run once more, with a change of its data."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json
from headwater.cli.show import show, show_json


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(redo)


def redo(
    run: Annotated[Path, typer.Argument(help="The folder of a run of `headwater train`.")],
    out: Annotated[Path, typer.Option(help="The new run's folder; made if needed, gone on with if it exists.")],
    remove: Annotated[
        Path | None,
        typer.Option(help="Sequences to leave out: pairs of terms (every sequence that mentions both), or numbers."),
    ] = None,
    repeat: Annotated[Path | None, typer.Option(help="Sequences to show --times as often.")] = None,
    times: Annotated[int, typer.Option(help="How often, with --repeat.")] = 2,
    reweight: Annotated[Path | None, typer.Option(help="Sequences whose loss is multiplied by --weight.")] = None,
    weight: Annotated[float, typer.Option(help="By what, with --reweight; 0 leaves their places empty.")] = 0.0,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of a source, as SOURCE.NAME=VALUE; may be repeated."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, where not as many.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed: other first weights, another order.")] = None,
    json: Json = False,
) -> None:
    """Train a run again with a change of its data: do(data).

    Pairs come from a CSV, JSONL or Parquet file with `subject` and `object`; numbers, counted in the order of the run,
    from a .npy file or a table with a column `sequence`. Killed, the same command goes on.
    """
    import yaml

    from headwater.core.errors import MethodError
    from headwater.dynamics.lab.redo import redo as run_again

    data: dict[str, dict[str, Any]] = {}
    for text in option or []:
        place, equals, value = text.partition("=")
        source, dot, name = place.rpartition(".")
        if not (equals and dot and source and name):
            raise MethodError("--set takes SOURCE.NAME=VALUE", got=repr(text), wanted="such as --set world.permute=1")
        try:
            data.setdefault(source, {})[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            data.setdefault(source, {})[name] = value
    made = run_again(
        run, out, remove=remove, repeat=None if repeat is None else (repeat, times),
        reweight=None if reweight is None else (reweight, weight), data=data, steps=steps, seed=seed,
    )  # fmt: skip
    about = made.data.change.about if made.data.change is not None else {}
    facts = {**made.result.facts, "folder": str(made.path), "change": about}
    if json:
        show_json(facts)
        return
    for name in ("removed", "repeated", "weighted"):
        if name in about:
            show(f"{name}: {about[name]} of {made.order.n_sequences} places")
    show(f"{facts['name']}: {facts['steps']} steps; loss of the last batch: {facts['loss']:.4g}")
    show(f"{len(facts['checkpoints'])} checkpoints in {made.path}")
