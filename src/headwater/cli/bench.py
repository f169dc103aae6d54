"""bench: models trained to a known mechanism, and toy models with an answer key; bench_programs.py has the rest."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli import bench_programs
from headwater.cli.bench_score import add_scores_to
from headwater.cli.options import Json
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows

Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the config, as NAME=VALUE; may be repeated.")
]


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    group = typer.Typer(no_args_is_help=True, help="Models and programs whose mechanism is known; benchmarks.")
    group.command("list")(list_)
    group.command("train")(train)
    group.command("check")(check)
    group.command("recover")(recover)
    toys = typer.Typer(no_args_is_help=True, help="Superposition, modular addition, group composition.")
    toys.command("list")(toys_list)
    toys.command("train")(toys_train)
    group.add_typer(toys, name="toys")
    bench_programs.add_to(group)
    add_scores_to(group)
    app.add_typer(group, name="bench")


def list_(json: Json = False) -> None:
    """List the models that can be trained to a known mechanism."""
    from headwater.bench.siit import configs

    rows: list[dict[str, Any]] = []
    for name in configs.names():
        config = configs.get(name)
        size = f"{config.family}, {config.n_layers} layers, {config.n_heads} heads, width {config.d_model}"
        rows.append({"name": name, "causal graph": config.graph, "model": size, "steps at most": config.steps})
    show_rows(rows, as_json=json)


def train(
    name: Annotated[str, typer.Argument(help="A config's name: see `bench list`.")],
    out: Annotated[Path, typer.Option(help="The folder for model, mechanism, pairs and checks.")],
    setting: Settings = None,
    checks: Annotated[int, typer.Option(min=2, help="How many inputs the final checks take.")] = 1000,
    json: Json = False,
) -> None:
    """Train a transformer until a causal graph explains it (SIIT); a run that was stopped goes on from its last
    check.
    """
    from headwater.bench import siit

    made = siit.train(name, out=out, checks=checks, **settings_of(setting))
    _show_report(made.report, json)
    if not json:
        show("")
        show(f"Model, mechanism, pairs and checks: {out}")
        show(f"Try: headwater bench recover eap_ig {out}")


def check(
    folder: Annotated[Path, typer.Argument(help="A folder that `bench train` wrote.")],
    n: Annotated[int, typer.Option(min=2, help="How many inputs.")] = 1000,
    seed: Annotated[int, typer.Option(help="The seed they are drawn with.")] = 2,
    json: Json = False,
) -> None:
    """Check a trained model anew: does the circuit carry its variables, and is all else without effect?"""
    from headwater.bench import siit

    _show_report(siit.load(folder).check(n=n, seed=seed), json)


def recover(
    method: Annotated[str, typer.Argument(help="A localizing method: `headwater methods` lists them.")],
    folder: Annotated[Path, typer.Argument(help="A folder that `bench train` wrote.")],
    n: Annotated[int, typer.Option(min=2, help="How many pairs.")] = 64,
    seed: Annotated[int, typer.Option(help="The seed they are made with.")] = 0,
    setting: Annotated[list[str] | None, typer.Option("--set", help="An option of the method, as NAME=VALUE.")] = None,
    json: Json = False,
) -> None:
    """Does a localizing method find the known circuit of a trained model? AUROC of nodes and edges."""
    from headwater.bench import siit
    from headwater.localize import methods

    made = siit.load(folder)
    found = siit.recovery(
        methods.get(method)(made.model, made.behavior(n, seed=seed), **settings_of(setting)), made.mechanism
    )
    if json:
        show_json({**found.facts, "nodes": found.tables["nodes"].to_dicts()})
        return
    show_rows(found.tables["nodes"].to_dicts(), as_json=False, title=f"{method} on {made.name}: nodes by score")
    show("")
    show("  ".join(f"{key} {_short(value)}" for key, value in found.facts.items() if value is not None))


def toys_list(json: Json = False) -> None:
    """List the toy models."""
    from headwater.bench.toys import toys

    show_rows([{"name": name, "what": toys.get(name).__doc__} for name in toys.names()], as_json=json)


def toys_train(
    name: Annotated[str, typer.Argument(help="A toy's name: see `bench toys list`.")],
    out: Annotated[Path, typer.Option(help="The folder for its result, and for its model where it has one.")],
    setting: Settings = None,
    json: Json = False,
) -> None:
    """Train a toy model and measure it against its answer key."""
    from headwater.bench import toys

    result = toys.train(name, out=out, **settings_of(setting))
    if json:
        show_json({"facts": result.facts, "rows": result.to_frame().to_dicts()})
        return
    show_rows(result.to_frame().head(20).to_dicts(), as_json=False, title=f"{name}: {result.kind}")
    show("")
    show("  ".join(f"{key} {_short(value)}" for key, value in result.facts.items() if value is not None))
    show(f"All of it: {out}")


def _show_report(report: Any, json: bool) -> None:
    if json:
        show_json({"facts": report.facts, "nodes": report.tables["nodes"].to_dicts()})
        return
    columns = ["node", "role", "variables", "accuracy", "lo", "hi", "moved", "shift"]
    title = f"{report.facts['graph']}: the model's answers after an interchange, against the causal graph's"
    show_rows(report.tables["nodes"].select(columns).to_dicts(), as_json=False, title=title)
    show("")
    show("  ".join(f"{key} {_short(value)}" for key, value in report.facts.items() if value is not None))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
