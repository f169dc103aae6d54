"""bench truth and bench rates: methods against known mechanisms, and how often claims are right."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json
from headwater.cli.show import show, show_json, show_rows

Programs = Annotated[
    list[str] | None, typer.Option("--programs", help="Compiled programs, names with commas; all where none is named.")
]


def add_scores_to(group: typer.Typer) -> None:
    """Put these commands into the group `bench`."""
    group.command("truth")(truth)
    group.command("rates")(rates)


def truth(
    methods: Annotated[
        list[str] | None, typer.Option("--methods", help="Methods, names with commas; all where none is named.")
    ] = None,
    programs: Programs = None,
    models: Annotated[
        list[Path] | None, typer.Option("--models", help="A folder that `bench train` wrote; may be repeated.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0 on.")] = 3,
    costly_seeds: Annotated[
        int, typer.Option(min=1, help="How many of them for methods that learn by hundreds of passes.")
    ] = 1,
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of each model, half of them to find on.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="A folder that keeps every cell; a run that was stopped goes on from there.")
    ] = None,
    json: Json = False,
) -> None:
    """Score localizing methods on models whose mechanism is known, beside what chance gives: the leaderboard.

    With `--models` and no `--programs`, only those models are scored. `--out` gets `leaderboard.json` and `result/`
    with every table as Parquet.
    """
    from headwater.bench.scoring.run import score
    from headwater.core.progress import progress_shown

    named = _names(programs)
    chosen: list[Any] | None = [*(named or []), *(models or [])] or None
    with progress_shown():
        found = score(
            _names(methods), chosen, seeds=tuple(range(seeds)), costly_seeds=costly_seeds, pairs=pairs, out=out
        )
    if json:
        show_json({name: found.tables[name].to_dicts() for name in ("leaderboard", "failed", "unscored", "models")})
        return
    rows = [_short(row) for row in found.to_frame().to_dicts()]
    size = f"{found.facts['models']} models, {seeds} seeds, {pairs} pairs each"
    show_rows(rows, as_json=False, title=f"Methods against known mechanisms: {size}")
    for row in found.tables["unscored"].to_dicts():
        show(f"Not scored: {row['method']}: {row['why']}")
    for row in found.tables["models"].unique("model", maintain_order=True).to_dicts():
        if row["why_not"]:
            show(f"Left out: {row['why_not']}")
    failed = found.tables["failed"]
    if failed.height:
        show(f"{failed.height} runs failed; the first: {failed['method'][0]} on {failed['model'][0]}:")
        show(f"  {failed['error'][0]}")
    if out is not None:
        show(f"All of it: {out}")


def rates(
    nulls: Annotated[int, typer.Option(min=0, help="How many null investigations.")] = 210,
    programs: Programs = None,
    repeats: Annotated[int, typer.Option(min=0, help="True investigations of each program.")] = 1,
    pairs: Annotated[int, typer.Option(min=16, help="Pairs of each investigation.")] = 64,
    seed: Annotated[int, typer.Option(help="The seed of all of them.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A folder that keeps every investigation; a stopped run goes on from there.")
    ] = None,
    json: Json = False,
) -> None:
    """How often headwater's claims are supported where nothing is to be found, and where something is.

    `--out` gets `rates.json` and `result/` with every table as Parquet.
    """
    from headwater.bench.rates import claim_rates
    from headwater.core.files import to_json, write_whole
    from headwater.core.progress import progress_shown

    named = _names(programs)
    options: dict[str, Any] = {} if named is None else {"programs": tuple(named)}
    with progress_shown():
        found = claim_rates(nulls=nulls, repeats=repeats, pairs=pairs, seed=seed, out=out, **options)
    rows = found.to_frame().to_dicts()
    if out is not None:
        found.save(out / "result")
        write_whole(out / "rates.json", to_json({"facts": found.facts, "rates": rows}).encode())
    if json:
        show_json({"facts": found.facts, "rates": rows, "failed": found.tables["failed"].to_dicts()})
        return
    show_rows(rows, as_json=False, title=f"Supported claims: {found.facts['investigations']} investigations")
    for row in found.tables["failed"].to_dicts():
        show(f"Could not be run: {row['kind']} {row['subject']}: {row['why']}")
    if out is not None:
        show(f"All of it: {out}")


def _names(given: list[str] | None) -> list[str] | None:
    """Names of an option that may be repeated or hold commas; None where there are none."""
    names = [name.strip() for text in given or [] for name in text.split(",")]
    return [name for name in names if name] or None


def _short(row: dict[str, Any]) -> dict[str, Any]:
    def interval(measure: str) -> str | None:
        value, low, high = (row[key] for key in (measure, f"{measure}_lo", f"{measure}_hi"))
        if value is None:
            return None
        return f"{value:.2f}" if low is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"

    return {
        "method": row["method"] + (" (baseline)" if row["what"] == "baseline" else ""),
        "node AUROC": interval("node_auroc"),
        "edge AUROC": interval("edge_auroc"),
        "node precision": row["node_precision"],
        "edge precision": row["edge_precision"],
        "node Spearman": row["node_spearman"],
        "edge Spearman": row["edge_spearman"],
        "passes": row["passes"],
        "models": row["models"],
        "failed": row["failed"],
    }
