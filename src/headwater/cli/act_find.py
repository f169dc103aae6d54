"""act find: what a reply hangs on, and what tells two kinds of prompts apart."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.cli.options import BehaviorName, Json, ModelName, Pairs
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_rows

FINDERS = {
    "grounding": ("headwater.act.safety.grounding", "grounding"),
    "known_entities": ("headwater.act.safety.entities", "known_entities"),
    "head_importance": ("headwater.act.safety.importance", "head_importance"),
    "cue_groups": ("headwater.act.training.cues", "cue_groups"),
    "pruning_curve": ("headwater.act.editing.prune", "pruning_curve"),
}


def find(
    what: Annotated[str, typer.Argument(help=f"What to find: {', '.join(FINDERS)}.")],
    behavior: BehaviorName,
    model: ModelName,
    n: Pairs = None,
    seed: Annotated[int, typer.Option(help="The seed they are made with.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option, as NAME=VALUE; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Save the result into this folder.")] = None,
    json: Json = False,
) -> None:
    """Find what a reply hangs on: heads that copy from the context, entities that are known, heads behind a refusal,
    cues behind errors, neurons that are not needed."""
    import importlib
    import inspect

    from headwater import behavior as behaviors
    from headwater.core.errors import MethodError, did_you_mean
    from headwater.core.loading import load

    if what not in FINDERS:
        raise MethodError("unknown thing to find", got=repr(what), wanted=did_you_mean(what, FINDERS))
    module, name = FINDERS[what]
    function = getattr(importlib.import_module(module), name)
    options = settings_of(option)
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if "config" not in known and (wrong := [key for key in options if key not in known]):
        raise MethodError(f"{what} has no such option", got=wrong[0], wanted=did_you_mean(wrong[0], known))
    pairs = behaviors.make(behavior, n=n, seed=seed)
    found: Any = function(load(model), pairs, **options)
    if out is not None:
        found.save(out)
    table = found.to_frame()
    show_rows(table.to_dicts(), as_json=json)
    if out is not None and not json:
        show(f"The result: {out}")
