"""The application: its command groups and the one entry point."""

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from headwater.cli import (
    act,
    attribute,
    behavior,
    bench,
    circuit,
    compare_models,
    count,
    examples,
    link,
    localize,
    models,
    ngrams,
    redo,
    repeated,
    trace,
    track,
    train,
    truth,
)
from headwater.cli.guard import Guarded

app = typer.Typer(
    name="headwater",
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from headwater import __version__

        typer.echo(f"headwater {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Trace what a language model does back to where it comes from: behavior, mechanism, claims, action."""


trace.add_to(app)
behavior.add_to(app)
localize.add_to(app)
circuit.add_to(app)
train.add_to(app)
redo.add_to(app)
repeated.add_to(app)
track.add_to(app)
compare_models.add_to(app)
count.add_to(app)
link.add_to(app)
ngrams.add_to(app)
examples.add_to(app)
attribute.add_to(app)
act.add_to(app)
truth.add_to(app)
bench.add_to(app)
models.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; leaves with 0, 2 (a mistake that can be mended), 130 (interrupted) or 1 (a bug)."""
    # Threads that wait by spinning make a forward up to ten times slower as soon as anything else runs on the machine;
    # waiting asleep costs nothing measurable on a quiet one. OpenMP reads this when torch loads; a user's choice stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(args=None if arguments is None else list(arguments), prog_name="headwater")
