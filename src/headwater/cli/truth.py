"""truth list|compile: models whose mechanism is known."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    group = typer.Typer(no_args_is_help=True, help="Models whose mechanism is known: compiled from programs.")
    group.command("list")(list_)
    group.command("compile")(compile_)
    app.add_typer(group, name="truth")


def list_(json: Json = False) -> None:
    """List the programs that can be compiled."""
    from headwater.bench.rasp.library import programs

    found = [programs.get(name) for name in programs.names()]
    rows = [{"name": p.name, "vocabulary": " ".join(map(str, p.vocabulary)), "what": p.about} for p in found]
    show_rows(rows, as_json=json)


def compile_(
    name: Annotated[str, typer.Argument(help="A program's name: see `truth list`.")],
    out: Annotated[Path, typer.Option(help="The folder for model, tokenizer, mechanism and pairs.")],
    max_length: Annotated[int, typer.Option(help="Most tokens of an input.")] = 7,
    causal: Annotated[bool | None, typer.Option(help="No position looks ahead; the program's own choice.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of the weights of heads and neurons without a task, and of the pairs.")
    ] = 0,
    n: Annotated[int, typer.Option(min=2, help="How many pairs to make.")] = 64,
    json: Json = False,
) -> None:
    """Compile a program into a transformer, with its known circuit and pairs to find it on."""
    from headwater.bench import truth
    from headwater.core.errors import BehaviorError

    options: dict[str, Any] = {} if causal is None else {"causal": causal}
    compiled = truth.compile(name, max_length=max_length, seed=seed, **options)
    compiled.save(out)
    pairs, lacking = "pairs.parquet", ""
    try:
        truth.behavior(compiled, n, seed=seed).save(out / pairs)
    except BehaviorError as error:  # the answer depends on the length only: a model without pairs is still a model
        pairs, lacking = None, str(error)
    graph = compiled.mechanism.graph
    facts = {
        "program": name,
        "layers": graph.n_layers,
        "heads": graph.n_heads,
        "d_model": graph.d_model,
        "edges": graph.n_edges,
        "edges_of_the_circuit": int(compiled.mechanism.tensors["mask"].sum()),
        "pairs": pairs,
    }
    if json:
        show_json({**facts, "edges_table": compiled.mechanism.tables["edges"].to_dicts()})
        return
    show("  ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    show("")
    show_rows(compiled.mechanism.tables["edges"].to_dicts(), as_json=False, title="Edges, and what they carry")
    show("")
    show(f"Model, tokenizer and mechanism: {out}")
    show(f"Try: headwater localize eap_ig {out}/pairs.parquet --model {out}" if pairs else lacking)
