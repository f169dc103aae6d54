"""localize: one method on one behavior of one model."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.options import BehaviorName, Json, ModelName, Pairs
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows

if TYPE_CHECKING:
    from headwater.core.results import Result


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(localize)
    app.command("methods")(list_methods)


def localize(
    method: Annotated[str, typer.Argument(help="A method's name, such as eap_ig; `headwater methods` lists them.")],
    behavior: BehaviorName,
    model: ModelName,
    n: Pairs = None,
    seed: Annotated[int, typer.Option(help="The seed they are made with.")] = 0,
    metric: Annotated[str, typer.Option(help="What is explained.")] = "logit_diff",
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, as NAME=VALUE; may be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows to print.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Also save the whole result into this folder.")] = None,
    json: Json = False,
) -> None:
    """Ask where in a model a behavior comes from, with one method."""
    from headwater import behavior as behaviors
    from headwater.core.loading import load
    from headwater.localize import methods

    run = methods.get(method)
    options = {"metric": metric, **settings_of(option)}
    _check_names(run, method, options)
    pairs = behaviors.make(behavior, n=n, seed=seed)
    result = run(load(model), pairs, **options)
    if out is not None:
        result.save(out)
    frame = result.to_frame()
    size = next((name for name in ("effect", "score") if name in frame.columns), None)
    if size is not None:
        frame = frame.sort(frame[size].abs(), descending=True)
    rows = frame.head(top).to_dicts()
    if json:
        show_json(rows)
        return
    show_rows(rows, as_json=False, title=f"{method} on {pairs.name}: the {len(rows)} largest of {frame.height}")
    if out is not None:
        show(f"All of it: {out}")


def list_methods(
    name: Annotated[str | None, typer.Argument(help="One method; all of them where none is named.")] = None,
    json: Json = False,
) -> None:
    """List the methods of `localize`: what each measures, how it is known to fail, and its options."""
    from headwater.localize.catalog import described, methods

    rows = [described(one) for one in ([name] if name else methods.names())]
    if json:
        show_json(rows)
        return
    if name is None:
        show_rows([{key: row[key] for key in ("name", "what")} for row in rows], as_json=False)
        return
    show_rows([{"": key, " ": value} for key, value in rows[0].items()], as_json=False)


def _check_names(run: "Callable[..., Result]", method: str, options: dict[str, Any]) -> None:
    """Refuse an option that the method's signature does not have (methods with a config check theirs themselves)."""
    from headwater.core.errors import MethodError, did_you_mean

    parameters = inspect.signature(run).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    known = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise MethodError(f"unknown option of {method}", got=repr(name), wanted=did_you_mean(name, known))
