"""nearest and memorized: the training sequences that look alike to a model, and those it gives back word for word."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.inputs import ids_of, model_and_corpus
from headwater.cli.options import Json
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows

Model = Annotated[str, typer.Argument(help="A name, a folder, a checkpoint of a run, or a run: its last one.")]
Corpus = Annotated[
    str | None, typer.Option(help="Token ids that it was trained on, or a run. [default: of a run its own]")
]
Out = Annotated[Path | None, typer.Option(help="Keep the result in this folder.")]


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(nearest)
    app.command()(memorized)


def nearest(
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="A text whose neighbours to find; may be repeated.")] = None,
    ids: Annotated[
        list[str] | None, typer.Option(help="Or its token ids, such as '12 7 300'; may be repeated.")
    ] = None,
    corpus: Corpus = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, such as k=5 or site=resid_post.3; may be repeated.")
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Find the training sequences whose hidden states look most like a query's. Alike is not responsible."""
    from headwater.core.errors import MethodError
    from headwater.core.methods import fitted
    from headwater.data import nearest as run_nearest
    from headwater.data.neighbours import NearestConfig

    asked: list[Any] = [*(text or []), *(ids_of(one) for one in ids or [])]
    if not asked:
        raise MethodError("what is to be looked for?", fix="Give --text or --ids")
    config = fitted(NearestConfig, settings_of(option))
    loaded, read = model_and_corpus(model, corpus)
    found = run_nearest(loaded, asked, read, config=config)
    if out is not None:
        found.save(out)
    told, about = found.tables["nearest"].to_dicts(), found.tables["queries"].to_dicts()
    if json:
        show_json({"facts": found.facts, "nearest": told, "queries": about})
        return
    show_rows(about, as_json=False, title=f"Cosines with all {found.facts['sequences']:,} sequences")
    show("")
    show_rows([{**row, "text": row["text"][:100]} for row in told], as_json=False, title="The nearest")
    if out is not None:
        show(f"All of it: {out}")


def memorized(
    model: Model,
    held: Annotated[str, typer.Option(help="Sequences of the same kind that were not trained on: token ids, a run.")],
    corpus: Corpus = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, such as prompt=16 or sequences=500; may be repeated.")
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Find the training sequences that a model gives back word for word, by how often they were seen."""
    from headwater.core.methods import fitted
    from headwater.data import memorized as run_memorized
    from headwater.data.memorization import MemorizedConfig

    config = fitted(MemorizedConfig, settings_of(option))
    loaded, read = model_and_corpus(model, corpus)
    found = run_memorized(loaded, read, held, config=config)
    if out is not None:
        found.save(out)
    repeats, sequences = found.tables["repeats"].to_dicts(), found.tables["sequences"].to_dicts()
    if json:
        show_json({"facts": found.facts, "repeats": repeats, "sequences": sequences})
        return
    facts = found.facts
    title = f"Of {facts['prompt']} tokens, the next {facts['continuation']} given back; seen 0 times: held out"
    show_rows(repeats, as_json=False, title=title)
    tried = sum(not row["held"] for row in sequences)
    told = f"{facts['share']:.2%} of {tried:,} of the {facts['distinct']:,} distinct sequences"
    show(f"extractable: {told}, {facts['held_share']:.2%} of the held ones")
    if out is not None:
        show(f"All of it: {out}")
