"""models: what can be loaded by a short name, which families are known, and what a model looks like inside."""

from typing import Annotated

import typer

from headwater.cli.show import show, show_json, show_rows

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    group = typer.Typer(
        invoke_without_command=True, help="Models by short name, known families, and a model's anatomy."
    )
    group.callback()(models)
    group.command("show")(show_)
    app.add_typer(group, name="models")


def models(context: typer.Context, json: Json = False) -> None:
    """List the short names and the families that are known; `models show MODEL` prints a model's anatomy."""
    if context.invoked_subcommand is not None:
        return
    from headwater.core.loading import ALIASES

    rows = [{"name": name, "what": alias.summary} for name, alias in sorted(ALIASES.items())]
    show_rows(rows, as_json=json)
    if not json:
        show("\nAny causal transformers model loads too: a hub id, a local folder, a GGUF file.")


def show_(
    model: Annotated[str, typer.Argument(help="An alias, hub id, local folder or GGUF file.")], json: Json = False
) -> None:
    """Print where each kind of site lives in a model, as measured when it was loaded."""
    from headwater.core.loading import load

    loaded = load(model)
    rows = [{"site": str(site)} for site in loaded.sites("*")]
    if json:
        show_json(rows)
    else:
        show_rows(rows, as_json=False, title=loaded.name)
