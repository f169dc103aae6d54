"""act compare: actions and baselines on one task, one budget, several seeds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json, ModelName
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows

_SHOWN = (
    "score", "efficacy", "paraphrase", "format", "neighbours", "others", "perplexity", "after relearning", "probe",
    "weights", "seconds",
)  # fmt: skip


def compare(
    task: Annotated[
        str,
        typer.Argument(
            help="A task (fact_edit, fact_unlearn, position_bias, choice_letters, spurious_cue), or a behavior's name "
            "or file."
        ),
    ],
    model: ModelName,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method of `headwater act run`, as NAME or NAME:OPTION=VALUE,...; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: each makes the task anew.")] = 3,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the comparison, as NAME=VALUE; may be repeated.")
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option("--task", help="An option of the task, as NAME=VALUE; may be repeated.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="An option of the LoRA baseline, as NAME=VALUE; may be repeated.")
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="A behavior that should stay: its name or file; may be repeated.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file that perplexity is measured on.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder: cells are kept there as they come, the result in its `result`.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare actions with prompting, few-shot examples, LoRA and random targets on one task and one budget.

    Killed, the same command with --out goes on where it was.
    """
    from headwater import behavior as behaviors
    from headwater.act.comparing.comparison import compare as compared
    from headwater.act.comparing.task import tasks
    from headwater.core.loading import load

    settings, of_task = settings_of(option), settings_of(task_option, "--task")
    what: Any = task if task in tasks else behaviors.make(task)
    found = compared(
        load(model),
        what,
        list(method or []),
        options=of_task,
        lora=settings_of(lora, "--lora"),
        others=None if other is None else [behaviors.make(name) for name in other],
        text=None if text is None else _read(text),
        out=out,
        seeds=seeds,
        **settings,
    )
    if out is not None:
        found.save(out / "result")
    if json:
        tables = {name: found.tables[name].to_dicts() for name in ("summary", "versus", "curves")}
        show_json({**tables, "verdict": found.facts["verdict"]})
        return
    table = found.wide()
    rows = [{name: row[name] for name in ("action", *_SHOWN) if name in row} for row in table.to_dicts()]
    show_rows(rows, as_json=False, title=f"{found.facts['task']}, goal: {found.facts['goal']}, means over seeds")
    notes = found.tables["summary"].filter(found.tables["summary"]["note"] != "").select("action", "measure", "note")
    if notes.height:
        show("")
        show_rows(notes.to_dicts(), as_json=False, title="What could not be measured")
    show("")
    for sentence in found.facts["verdict"]:
        show(sentence)


def _read(path: Path) -> str:
    from headwater.core.files import store_error

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            raise store_error(error, path, "read") from error
        from headwater.core.errors import StoreError

        raise StoreError(f"{path} is no text", got="bytes that are not UTF-8") from None
