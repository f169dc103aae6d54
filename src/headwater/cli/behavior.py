"""behavior list|show|check and evaluate: what a model is asked, and how well it does."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.guard import say
from headwater.cli.options import Json, ModelName
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    group = typer.Typer(no_args_is_help=True, help="Behaviors: tables of minimal pairs.")
    group.command("list")(list_)
    group.command("show")(show_)
    group.command("check")(check)
    app.add_typer(group, name="behavior")
    app.command()(evaluate)


def list_(json: Json = False) -> None:
    """List the behaviors that headwater can make."""
    from headwater import behavior

    rows = [{"name": name, "what": _summary(behavior.generators.registry.get(name))} for name in behavior.names()]
    show_rows(rows, as_json=json)


def show_(
    name: Annotated[str, typer.Argument(help="A behavior's name or a CSV, JSONL or Parquet file.")],
    n: Annotated[int, typer.Option(min=1, help="How many pairs to show.")] = 5,
    seed: Annotated[int, typer.Option(help="The seed they are made with.")] = 0,
    json: Json = False,
) -> None:
    """Show pairs of a behavior."""
    from headwater import behavior

    rows = behavior.make(name, n=max(n, 2), seed=seed).frame.head(n).to_dicts()
    if json:
        show_json(rows)
        return
    for row in rows:
        show(f"{row['id']}  [{row['split']}]")
        show(f"  prompt          {row['prompt']!r}")
        show(f"  counterfactual  {row['counterfactual']!r}")
        show(f"  answers {row['answers']}  foils {row['foils']}")


def check(
    file: Annotated[Path, typer.Argument(help="A CSV, JSONL or Parquet file of minimal pairs.")],
    model: Annotated[str | None, typer.Option(help="Also check that this model's tokenizer aligns the pairs.")] = None,
    json: Json = False,
) -> None:
    """Say line by line what is wrong with a file of pairs; leaves with 2 if anything is."""
    from headwater import behavior

    rows = behavior.check.check(file, _loaded(model)).to_dicts()
    errors = [row for row in rows if row["level"] == "error"]
    if json:
        show_json({"file": str(file), "problems": rows})
    elif rows:
        show_rows(rows, as_json=False)
    else:
        show(f"{file}: nothing wrong.")
    if errors:
        count = "1 error, listed above" if len(errors) == 1 else f"{len(errors)} errors, listed above"
        say(f"{file} cannot be used as it is: it has {count} with the mend of each.", label="error")
        raise typer.Exit(2)


def evaluate(
    name: Annotated[str, typer.Argument(metavar="BEHAVIOR", help="A behavior's name or a file of pairs.")],
    model: ModelName,
    n: Annotated[int | None, typer.Option(min=1, help="How many pairs.")] = None,
    seed: Annotated[int, typer.Option(help="The seed they are made with.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also save the result into this folder.")] = None,
    json: Json = False,
) -> None:
    """Measure how well a model does a behavior, with intervals, per slice, and its canary where it has one."""
    from headwater import behavior
    from headwater.core.loading import load

    table = behavior.make(name, n=n, seed=seed)
    result = behavior.evaluate.evaluate(load(model), table)
    if out is not None:
        result.save(out)
    if json:
        show_json({key: frame.to_dicts() for key, frame in result.tables.items() if key != "rows"})
        return
    metrics = result.tables["metrics"].to_dicts()
    whole = [row for row in metrics if row["slice_name"] == "all"]
    columns = ("metric", "value", "lo", "hi", "n")
    rows = [{column: row[column] for column in columns} for row in whole]
    show_rows(rows, as_json=False, title=f"{table.name}, {table.n} pairs (lo, hi: 95% interval)")
    slices = [row for row in metrics if row["slice_name"] != "all" and row["metric"] == table.metric]
    if slices:
        show("")
        rows = [{column: row[column] for column in ("slice_name", "slice", *columns[1:])} for row in slices]
        show_rows(rows, as_json=False, title=f"{table.metric} by slice")
    canary = result.tables.get("canary")
    if canary is not None and canary.height:
        show("")
        show_rows(canary.to_dicts(), as_json=False, title="Canary: is it the format or the answer that is not known?")
    dropped = result.tables.get("dropped")
    if dropped is not None and dropped.height:
        show("")
        reasons = dropped.group_by("reason").len("pairs").sort("reason").to_dicts()
        show_rows(reasons, as_json=False, title="Pairs dropped")


def _summary(generator: Any) -> str:
    return (getattr(generator, "__doc__", None) or "").strip().split("\n")[0]


def _loaded(model: str | None) -> Any:
    if model is None:
        return None
    from headwater.core.loading import load

    return load(model)
