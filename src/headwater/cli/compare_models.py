"""connect, delta: two checkpoints or models held against each other."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json, Pairs
from headwater.cli.show import show, show_json, show_rows

Model = Annotated[str, typer.Argument(help="A hub id, a folder, or a checkpoint such as runs/a/step-800.")]
Out = Annotated[Path | None, typer.Option(help="Keep the result in this folder.")]


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(connect)
    app.command()(delta)


def connect(
    a: Model,
    b: Model,
    text: Annotated[
        Path | None, typer.Option(help="A text to take sequences from. [default: the run's own, for one of the lab]")
    ] = None,
    points: Annotated[int, typer.Option(min=3, help="Places on the line, both ends among them.")] = 11,
    out: Out = None,
    json: Json = False,
) -> None:
    """The loss on the straight line between the weights of two models: is there a barrier?"""
    from headwater.cli.track import tokens_of
    from headwater.core.errors import MethodError
    from headwater.core.loading import load
    from headwater.dynamics.connectivity import connect as run_connect
    from headwater.dynamics.timeline import own_tokens

    first, second = load(a), load(b)
    loss_at = None
    if text is not None:
        ids = tokens_of(first, text)
    elif (Path(a).parent / "train.json").exists():
        ids, loss_at = own_tokens(Path(a).parent)
    else:
        raise MethodError("a line needs sequences of tokens to be measured on", fix="Give --text FILE")
    found = run_connect(first, second, ids, loss_at=loss_at, points=points, names=(a, b))
    if out is not None:
        found.save(out)
    if json:
        show_json({**found.facts, "line": found.tables["line"].to_dicts()})
        return
    show_rows(found.tables["line"].select("part", "loss", "straight", "above").to_dicts(), as_json=False)
    f = found.facts
    show(f"barrier: {f['barrier']:.4g} nats ({f['lo']:.4g} to {f['hi']:.4g}), at {f['at']:.2f} of the way")


def delta(
    old: Model,
    new: Model,
    behavior: Annotated[
        str | None, typer.Option(help="One that the old model has and the new one lost: a name or a file of pairs.")
    ] = None,
    n: Pairs = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """What changed from one model to another; and was a lost behavior taken away, or only wrapped?"""
    from headwater import behavior as behaviors
    from headwater.dynamics.delta import delta as run_delta

    pairs: Any = behaviors.make(behavior, n=n, seed=seed) if behavior is not None else None
    found = run_delta(old, new, pairs, names=(old, new), seed=seed)
    if out is not None:
        found.save(out)
    if json:
        show_json({**found.facts, **{name: table.to_dicts() for name, table in found.tables.items()}})
        return
    columns = ["component", "weights", "change", "relative", "share", "cosine"]
    ranked = found.tables["components"].sort("share", descending=True).head(15).select(columns)
    show_rows(ranked.to_dicts(), as_json=False, title="What moved, the most first")
    if behavior is not None:
        columns = ["how", "fraction", "value", "back", "null", "null_most"]
        show_rows(
            found.tables["revival"].select(columns).to_dicts(), as_json=False, title="The most moved weights undone"
        )
        columns = ["layer", "value", "back", "probe_old", "probe_new"]
        show_rows(
            found.tables["layers"].select(columns).to_dicts(), as_json=False,
            title="The new model up to a layer, read on by the old one",
        )  # fmt: skip
        show(f"{found.verdict}: {found.facts['why']}")
