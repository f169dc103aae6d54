"""attribute: which training sequences a behavior is put down to, and what it is worth without them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(attribute)


def attribute(
    model: Annotated[str, typer.Argument(help="A run of `headwater train`, a folder of checkpoints, or a hub id.")],
    behavior: Annotated[str | None, typer.Option(help="A behavior's name or a file of pairs.")] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="Or CSV, JSONL or Parquet with prompt, answer (and subject, object, to search for)."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Token ids, or a run. [default: of a run its own data, in its order]")
    ] = None,
    n: Annotated[int | None, typer.Option(min=2, help="How many pairs of a behavior.")] = None,
    method: Annotated[str, typer.Option(help="cosine, tracin, trak or ekfac.")] = "tracin",
    k: Annotated[int, typer.Option(min=1, help="How many of the first are told, and removed.")] = 10,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as NAME=VALUE (checkpoints=5); may be repeated.")
    ] = None,
    retrain: Annotated[
        Path | None, typer.Option(help="Also train the run again without the first k of each ranking; runs lie here.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of these trainings.")] = "0,1,2",
    seed: Annotated[int, typer.Option(help="Of pairs and projections.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also save the results into this folder.")] = None,
    json: Json = False,
) -> None:
    """Score training sequences by how much each would help a behavior, beside base rate and a plain search.

    A score is no cause: --retrain is the test.
    """
    from headwater import behavior as behaviors
    from headwater.core.errors import MethodError
    from headwater.data import attribute as run_attribute
    from headwater.data import remove_and_retrain

    if (behavior is None) == (queries is None):
        raise MethodError("what is to be explained?", fix="Give --behavior, or --queries")
    asked: Any = None
    pairs: Any = None
    if behavior is not None:
        asked = behaviors.make(behavior, n=n, seed=seed)
    elif queries is not None:
        asked, pairs = _queries(queries)
    options = {"seed": seed, "k": k, "method": method} | settings_of(option)
    try:
        numbers = [int(part) for part in seeds.split(",") if part.strip()]
    except ValueError:
        raise MethodError("--seeds takes numbers", got=repr(seeds), wanted="such as 0,1,2") from None
    if retrain is not None and corpus is not None:
        raise MethodError("--retrain numbers sequences in the run's own order", fix="Leave --corpus out")
    found = run_attribute(model, asked, corpus, pairs=pairs, **options)
    removed = remove_and_retrain(model, asked, found, retrain, seeds=numbers) if retrain is not None else None
    if out is not None:
        found.save(out / "attribution")
        if removed is not None:
            removed.save(out / "removal")
    summary, top = found.tables["summary"].to_dicts(), found.tables["top"].to_dicts()
    effect = removed.tables["effect"].to_dicts() if removed is not None else None
    if json:
        show_json({"summary": summary, "top": top, "queries": found.tables["queries"].to_dicts(), "effect": effect})
        return
    show_rows(summary, as_json=False, title=f"Of the first {k} of {found.facts['sequences']:,} sequences")
    show("")
    first = [row for row in top if row["rank"] < 3 and row["ranking"] == method]
    show_rows(first[:30], as_json=False, title=f"The first by {method}")
    show("")
    if effect is None:
        show("Scores are no causes: --retrain trains again without these sequences.")
    else:
        show_rows(effect, as_json=False, title="Trained again without the first of each ranking")
    if out is not None:
        show(f"All of it: {out}")


def _queries(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]] | None]:
    """((prompt, answer)s, (subject, object)s where the file has them)."""
    import polars as pl

    from headwater.core.errors import StoreError, did_you_mean
    from headwater.core.files import store_error

    # of CSV all are texts: an answer 007 is not 7
    readers: dict[str, Any] = {
        ".csv": lambda file: pl.read_csv(file, infer_schema=False), ".jsonl": pl.read_ndjson,
        ".parquet": pl.read_parquet,
    }  # fmt: skip
    if path.suffix not in readers:
        raise StoreError("queries in a file of unknown kind", got=path, wanted=", ".join(readers))
    try:
        frame = readers[path.suffix](path)
    except OSError as error:
        raise store_error(error, path, "read") from error
    except pl.exceptions.PolarsError as error:
        raise StoreError(f"cannot read queries from {path}", got=str(error).splitlines()[0]) from None
    for name in ("prompt", "answer"):
        if name not in frame.columns:
            raise StoreError(f"{path} has no column {name!r}", wanted=did_you_mean(name, frame.columns))
    sides = ["prompt", "answer"] + (["subject", "object"] if {"subject", "object"} <= set(frame.columns) else [])
    frame = frame.select(pl.col(sides).cast(pl.String))
    if not frame.height or frame.null_count().sum_horizontal().item():
        raise StoreError(f"{path} has queries that lack something", got=f"{frame.height} rows", wanted=", ".join(sides))
    pairs = list(frame.select("subject", "object").iter_rows()) if len(sides) == 4 else None
    return list(frame.select("prompt", "answer").iter_rows()), pairs
