"""trace, resume, verify, report: the whole pipeline, and what is done with its folder."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.guard import resumable, say
from headwater.cli.options import Json
from headwater.cli.show import show, show_json, show_rows

if TYPE_CHECKING:
    from headwater.core.store import RunFolder


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    for command in (trace, resume, verify, report):
        app.command()(command)


def trace(
    behavior: Annotated[
        str | None,
        typer.Argument(help="A behavior's name (`headwater behavior list`) or a CSV, JSONL or Parquet file."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="An alias (`headwater models`), hub id, local folder or GGUF file; or a folder of `headwater train`."
        ),
    ] = None,
    history: Annotated[
        str | None,
        typer.Option(
            help="The checkpoints of a model that the lab did not make: a folder, or a hub id such as "
            "EleutherAI/pythia-70m."
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="What that model read, in order: a file or folder (`headwater count` says which)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; made if needed, gone on with if it exists.")
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=2, help="How many pairs; the behavior's own number if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it. [default: 0]")] = None,
    stages: Annotated[
        str | None, typer.Option(help="Only these stages, comma-separated, and what they need. [default: all]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="An investigation as a YAML file; options given beside it win.")
    ] = None,
) -> None:
    """Trace a behavior of a model to the mechanism behind it, test that, act on it, and write a report."""
    from headwater.core.errors import HeadwaterError
    from headwater.trace.investigation import Investigation

    given: dict[str, Any] = {"behavior": behavior, "model": model, "history": history, "corpus": corpus}
    given |= {"out": out, "n": n, "seed": seed}
    if stages is not None:
        given["stages"] = tuple(name.strip() for name in stages.split(",") if name.strip())
    options = {name: value for name, value in given.items() if value is not None}
    if config is None:
        missing = [name for name in ("behavior", "model", "out") if name not in options]
        if missing:
            raise HeadwaterError(
                f"trace lacks {' and '.join(missing)}",
                wanted="a behavior, --model and --out, or --config with a file that gives them",
                fix="For example: headwater trace ioi --model smollm2 --out runs/ioi",
            )
        investigation = Investigation(**options)
    else:
        investigation = Investigation.from_yaml(config, **options)
    with resumable(Path(investigation.out)):
        run = investigation.run()
    _finish(run)


def resume(folder: Annotated[Path, typer.Argument(help="The folder of a run that was interrupted.")]) -> None:
    """Go on with an interrupted run; the result is the same as if it had never been interrupted."""
    from headwater.trace.investigation import Investigation

    with resumable(folder):
        run = Investigation.resume(folder)
    _finish(run)


def verify(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    json: Json = False,
) -> None:
    """Run every test of a run's ledger again, from what is stored; leaves with 1 if one comes out differently."""
    from headwater.trace.verify import verify as run_again

    outcome = run_again(folder)
    rows = outcome.to_frame().to_dicts()
    if json:
        show_json(rows)
    else:
        show_rows([{name: value for name, value in row.items() if name != "statement"} for row in rows], as_json=False)
    differing = [row["id"] for row in rows if not row["same"]]
    if differing:
        say(f"{len(differing)} of {len(rows)} claims came out differently: {', '.join(differing)}", label="verify")
        raise typer.Exit(1)
    if not json:
        show(f"All {len(rows)} claims came out as stored.")


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    json: Json = False,
) -> None:
    """Write the report of a run again, from what is stored: one HTML file that needs no network."""
    from headwater.report import write_report

    path = Path(write_report(folder))
    if json:
        show_json({"report": str(path)})
    else:
        show(f"Report: {path}")


def _finish(run: "RunFolder") -> None:
    """What was found, in words, and where to read the rest."""
    if run.has("claims"):
        for line in run.facts("claims").get("verdict", []):
            show(f"{line}\n")
    page = run.path / "report.html"
    if page.exists():
        show(f"Report: {page.resolve()}")
    show(f"Run its tests again with: {shlex.join(['headwater', 'verify', str(run.path)])}")
