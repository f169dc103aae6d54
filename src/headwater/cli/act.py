"""act and edit: make an action for a behavior and measure it; put edits of weights onto a model and take them off."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.cli.act_compare import compare
from headwater.cli.act_find import find
from headwater.cli.options import BehaviorName, Json, ModelName, Pairs
from headwater.cli.settings import settings_of
from headwater.cli.show import show, show_json, show_rows

if TYPE_CHECKING:
    from headwater.act.effects import Effect

_SHOWN = ("action", "measure", "before", "after", "change", "lo", "hi", "n", "note")


def add_to(app: typer.Typer) -> None:
    """Put these groups into the application."""
    group = typer.Typer(no_args_is_help=True, help="Act on a model, and measure whether that helped.")
    group.command("run")(run)
    group.command("methods")(list_methods)
    group.command("compare")(compare)
    group.command("find")(find)
    app.add_typer(group, name="act")
    edits = typer.Typer(no_args_is_help=True, help="Edits of weights: small files that go on a model and come off.")
    edits.command("list")(list_)
    edits.command("apply")(apply)
    edits.command("undo")(undo)
    app.add_typer(edits, name="edit")


def run(
    method: Annotated[str, typer.Argument(help="A method's name, such as caa or rome; see `headwater act methods`.")],
    behavior: BehaviorName,
    model: ModelName,
    n: Pairs = None,
    seed: Annotated[int, typer.Option(help="The seed they are made with, and random versions are drawn with.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, as NAME=VALUE; may be repeated.")
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="A behavior that should stay: its name or file; may be repeated.")
    ] = None,
    controls: Annotated[int, typer.Option(min=0, help="How many random versions are drawn.")] = 5,
    no_prompting: Annotated[bool, typer.Option("--no-prompting", help="Leave out the best prompt.")] = False,
    out: Annotated[Path | None, typer.Option(help="Save the action into this file (safetensors).")] = None,
    effect_out: Annotated[Path | None, typer.Option(help="Save what was measured into this folder.")] = None,
    json: Json = False,
) -> None:
    """Make an action with one method, and measure what it does beside prompting and random versions of it."""
    from headwater import behavior as behaviors
    from headwater.act import effect
    from headwater.act.catalog import act, methods
    from headwater.act.files import save
    from headwater.core.loading import load

    methods.get(method)
    options = settings_of(option)
    pairs = behaviors.make(behavior, n=n, seed=seed)
    stay = [behaviors.make(name, n=n, seed=seed) for name in other] if other else None
    loaded = load(model)
    made = act(method, loaded, pairs, **options)
    if out is not None:
        save(made, out, model=loaded)
    found = effect(loaded, pairs, made, others=stay, controls=controls, prompting=not no_prompting, seed=seed)
    if effect_out is not None:
        found.save(effect_out)
    _show_effect(found, json)
    if out is not None and not json:
        show(
            f"The action: {out}" + (f"; try: headwater edit apply {out} --model {model} --out FOLDER" * bool(made.edit))
        )


def list_methods(
    name: Annotated[str | None, typer.Argument(help="One method; all of them where none is named.")] = None,
    json: Json = False,
) -> None:
    """List the methods of `act run`: what each does, how it is known to fail, and its options."""
    from headwater.act.catalog import described, methods

    rows = [described(one) for one in ([name] if name else methods.names())]
    if json:
        show_json(rows)
    elif name is None:
        show_rows([{key: row[key] for key in ("name", "what")} for row in rows], as_json=False)
    else:
        show_rows([{"": key, " ": value} for key, value in rows[0].items()], as_json=False)


def list_(
    path: Annotated[Path, typer.Argument(help="A file of an edit, or a folder of `edit apply`.")], json: Json = False
) -> None:
    """List the edits of a file or of an edited model: what each changes, and for which model it was made."""
    from headwater.act.exporting import list_edits

    rows: list[dict[str, Any]] = []
    for at, edit in enumerate(list_edits(path)):
        kinds = sorted({delta.kind for delta in edit.deltas})
        stored = sum(delta.stored for delta in edit.deltas)
        row = {"": at, "edit": edit.name, "model": edit.model, "fingerprint": edit.fingerprint}
        rows.append(row | {"changes": edit.parameters, "kinds": kinds, "numbers stored": stored, "norm": edit.norm})
    show_rows(rows, as_json=json)


def apply(
    files: Annotated[list[Path], typer.Argument(help="Files of edits, in the order in which they go on.")],
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The folder for the edited model: a normal checkpoint.")],
    json: Json = False,
) -> None:
    """Put edits onto a model and write it as a normal checkpoint, which remembers how to take them off."""
    from headwater.act.edit import Edit
    from headwater.act.exporting import export
    from headwater.core.loading import load

    edits = [Edit.load(file) for file in files]
    loaded = load(model)
    for edit in edits:
        edit.apply(loaded)
    export(loaded, out)
    rows = [{"edit": edit.name, "weights it may change": edit.n_weights(loaded)} for edit in edits]
    show_rows(rows, as_json=json)
    if not json:
        show(f"The edited model: {out}; take them off: headwater edit undo {out} --out FOLDER")


def undo(
    folder: Annotated[Path, typer.Argument(help="A folder of `edit apply`.")],
    out: Annotated[Path, typer.Option(help="The folder for the model as it was.")],
    json: Json = False,
) -> None:
    """Take all edits off a model that `edit apply` wrote: the weights are what they were, to the bit."""
    from headwater.act.exporting import list_edits, restore, write_checkpoint
    from headwater.core.files import whole_folder
    from headwater.core.loading import load

    edits = list_edits(folder)
    model = restore(folder, load(str(folder.absolute())))
    with whole_folder(out) as new:
        write_checkpoint(model, new)
    if json:
        show_json({"undone": [edit.name for edit in edits], "fingerprint": model.fingerprint, "folder": str(out)})
        return
    show(f"Taken off: {', '.join(edit.name for edit in edits)}")
    show(f"The model as it was ({model.fingerprint}): {out}")


def _show_effect(found: "Effect", json: bool) -> None:
    if json:
        versus = found.tables["versus"].to_dicts()
        show_json({"rows": found.to_frame().to_dicts(), "versus": versus, "costs": found.facts["costs"]})
        return
    rows = [{key: row[key] for key in _SHOWN} for row in found.to_frame().to_dicts()]
    show_rows(rows, as_json=False, title=f"What it does to {found.facts['behavior']}, to others and to plain text")
    show("")
    keys = ("control", "measure", "gain", "control_gain", "difference", "lo", "hi")
    against = [{key: row[key] for key in keys} for row in found.tables["versus"].to_dicts()]
    show_rows(against, as_json=False, title="Against its controls (above 0 it does better)")
    show("")
    show_rows(found.facts["costs"], as_json=False, title="What it costs")
