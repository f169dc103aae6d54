"""track: measures over the checkpoints of a training run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import Json, Pairs
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows


def add_to(app: typer.Typer) -> None:
    """Put this group's commands into the application."""
    app.command()(track)


def track(
    model: Annotated[str, typer.Argument(help="A run of `headwater train`, a folder of checkpoints, or a hub id.")],
    behavior: Annotated[str | None, typer.Option(help="A behavior's name or a file of pairs.")] = None,
    n: Pairs = None,
    measures: Annotated[
        str | None, typer.Option(help="Comma-separated. [default: loss, or behavior where one is given]")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of a measure, MEASURE.NAME=VALUE (circuit.fraction=.1); may be repeated."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text, JSONL or Parquet file to take sequences of tokens from.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Only these steps, comma-separated.")] = None,
    checkpoints: Annotated[int | None, typer.Option(min=1, help="At most so many, evenly in log(1 + step).")] = None,
    stage: Annotated[int | None, typer.Option(help="Of a repository that trains in stages.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep what is measured here; killed, it goes on, and processes share the work.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network.")] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="First compare the checkpoints: is each what its name says?")
    ] = False,
    json: Json = False,
) -> None:
    """Measure every checkpoint of a training run, and say when what is measured changed."""
    from headwater import behavior as behaviors
    from headwater.core.errors import MethodError
    from headwater.dynamics import CheckpointSeries
    from headwater.dynamics import track as run_track

    if behavior is None and n is not None:
        raise MethodError("--n counts the pairs of a behavior", fix="Give --behavior")
    series = CheckpointSeries.of(model, stage=stage, offline=offline or None)
    if steps is not None:
        try:
            series = series.select([int(part) for part in steps.split(",") if part.strip()])
        except ValueError:
            raise MethodError("--steps takes numbers", got=repr(steps), wanted="such as 0,1,2,1000") from None
    if checkpoints is not None:
        series = series.select(n=checkpoints)
    verdict = None
    if audit:
        found = series.audit()
        verdict = found.facts["verdict"]
        if out is not None:
            found.save(out / "audit")
    chosen = measures or ("behavior" if behavior is not None else "loss")
    options: dict[str, Any] = {"measures": chosen, "seed": seed, "settings": _settings(option or [])}
    if text is not None:
        options["tokens"] = tokens_of(series.open(series.steps[0]), text)
    pairs = behaviors.make(behavior, n=n, seed=seed) if behavior is not None else None
    timeline = run_track(series, behavior=pairs, out=out, **options)
    values, changes = timeline.tables["values"], timeline.tables["transitions"]
    if json:
        show_json({"values": values.to_dicts(), "transitions": changes.to_dicts(), "audit": verdict})
        return
    if verdict is not None:
        show(verdict)
    last = timeline.tables["checkpoints"]["step"].to_list()[-1]
    told = values.filter(values["step"] == last).drop("step")
    show_rows(told.head(30).to_dicts(), as_json=False, title=f"At step {last}, the last of {len(series)}")
    show("")
    kept = ["measure", "name", "step", "lo", "hi", "before", "after", "half", "p"]
    ranked = changes.sort("share", descending=True).head(20).select(kept)
    show_rows(ranked.to_dicts(), as_json=False, title="Changes of level, the clearest first")
    if out is not None:
        show(f"All of it: {out / 'timeline'}")


def _settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    from headwater.core.errors import MethodError

    found: dict[str, dict[str, Any]] = {}
    for name, value in settings_of(texts, dotted=True).items():
        measure, dot, own = name.partition(".")
        if not dot:
            raise MethodError("--set takes MEASURE.NAME=VALUE", got=repr(name), wanted="such as circuit.fraction=.1")
        found.setdefault(measure, {})[own] = value
    return found


def tokens_of(model: Any, text: Path) -> Any:
    """Sequences of tokens of a file, by the model's tokenizer: documents joined, cut into 128 tokens."""
    import torch

    from headwater.core.errors import ModelError
    from headwater.dynamics.lab.sources import read_texts

    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer", fix="Measure what needs no text")
    length = min(128, model.max_length or 128)
    held: list[int] = []
    mark = model.tokenizer.eos_token_id
    for document in read_texts(text):
        held += model.tokenizer(document, add_special_tokens=False)["input_ids"] + ([] if mark is None else [mark])
        if len(held) >= 32 * length:
            break
    if len(held) < length:
        length = len(held)
    if length < 2:
        raise ModelError(f"{text} is too short to measure on", got=f"{len(held)} tokens")
    n = min(32, len(held) // length)
    return torch.tensor(held[: n * length]).view(n, length)
