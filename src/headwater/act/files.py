"""Actions as files: interventions and edits in one safetensors file, read back as the same action."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from headwater.act.action import Action, Goal
from headwater.act.edit import Edit, load_tensors, save_tensors
from headwater.core.errors import MethodError, StoreError
from headwater.core.files import plain
from headwater.core.interventions import Intervention
from headwater.core.sites import Site

if TYPE_CHECKING:
    from collections.abc import Callable

_NUMBERS = ("scale", "low", "high")


def save(action: Action, path: str | Path, *, model: Any = None) -> Path:
    """Write an action into one safetensors file: vectors and changes of weights as tensors, all else as JSON.

    `model` (a Model) is noted, by name and fingerprint. What made the random version is not kept. Raises MethodError
    for interventions that hold values of particular prompts, StoreError where the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    gates: dict[int, str] = {}
    done = [_facts(at, one, tensors, gates) for at, one in enumerate(action.interventions)]
    facts: dict[str, Any] = {
        "kind": "action",
        "name": action.name,
        "prefix": action.prefix,
        "goal": dataclasses.asdict(action.goal),
        "values": action.values,
        "passes": action.passes,
        "seconds": action.seconds,
        "config": plain(action.config),
        "interventions": done,
        "edit": action.edit.as_json() if action.edit is not None else None,
        "sweep": action.sweep.to_dicts() if action.sweep is not None else None,
        "model": getattr(model, "name", action.edit.model if action.edit is not None else ""),
        "fingerprint": getattr(model, "fingerprint", action.edit.fingerprint if action.edit is not None else ""),
    }
    if action.edit is not None:
        tensors |= action.edit.tensors()
    # A file of safetensors needs no tensor, but a prompt alone has none; an empty one keeps readers simple.
    return save_tensors(Path(path), facts, tensors or {"nothing": torch.zeros(0)})


def load(path: str | Path) -> Action:
    """Read a file that `save`, or `Edit.save`, wrote. Raises StoreError."""
    facts, tensors = load_tensors(Path(path))
    if facts.get("kind") == "edit":
        edit = Edit.from_json(facts, tensors, str(path))
        return Action(name=edit.name, edit=edit, config={"action": "edit", **edit.config}, control=_at_random(edit))
    if facts.get("kind") != "action":
        raise StoreError(f"{path} holds no action", got=facts.get("kind"), wanted="a file of `headwater act`")
    try:
        gates: dict[str, Any] = {}
        edit = Edit.from_json(facts["edit"], tensors, str(path)) if facts["edit"] is not None else None
        return Action(
            name=str(facts["name"]),
            interventions=tuple(_intervention(one, tensors, gates) for one in facts["interventions"]),
            prefix=str(facts["prefix"]),
            edit=edit,
            goal=Goal(**facts["goal"]),
            values=int(facts["values"]),
            passes=int(facts["passes"]),
            seconds=float(facts["seconds"]),
            control=_at_random(edit, Goal(**facts["goal"])) if edit is not None else None,
            config=dict(facts["config"]),
            sweep=pl.DataFrame(facts["sweep"]) if facts["sweep"] is not None else None,
        )
    except (KeyError, TypeError, ValueError, MethodError) as error:
        raise StoreError(f"{path} does not hold a whole action", got=f"{type(error).__name__}: {error}") from None


def _at_random(edit: Edit, goal: Goal | None = None) -> "Callable[[int], Action]":
    def control(seed: int) -> Action:
        drawn = edit.at_random(seed)
        return Action(name=drawn.name, edit=drawn, goal=goal or Goal())

    return control


def _kinds() -> dict[str, type[Intervention]]:
    from headwater.act.ablation import Scale
    from headwater.act.steering.conditional import Gated, Watch
    from headwater.act.steering.turn import Turn

    return {kind.__name__: kind for kind in (Intervention, Scale, Turn, Watch, Gated)}


def _facts(at: int, one: Intervention, tensors: dict[str, torch.Tensor], gates: dict[int, str]) -> dict[str, Any]:
    if type(one).__name__ not in _kinds() or one.whole or one._by_site is not None or isinstance(one.value, list):
        raise MethodError("this intervention cannot be kept in a file", got=str(one), wanted="vectors and numbers")
    for name in ("value", "source"):
        if (value := getattr(one, name)) is not None:
            tensors[f"interventions.{at}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
    where = one.positions
    if isinstance(where, slice):
        where = {"slice": [where.start, where.stop]}
    elif isinstance(where, torch.Tensor):
        where = where.tolist()
    facts = {"at": at, "type": type(one).__name__, "site": str(one.site), "op": one.op, "label": one.label}
    facts |= {"positions": where} | {name: getattr(one, name) for name in _NUMBERS}
    if hasattr(one, "gate"):
        facts["gate"] = gates.setdefault(id(one.gate), f"gate {len(gates)}")  # type: ignore[attr-defined]
    return facts


def _intervention(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], gates: dict[str, Any]) -> Intervention:
    from headwater.act.steering.conditional import Gate

    where = facts["positions"]
    options: dict[str, Any] = {name: facts[name] for name in _NUMBERS}
    if "gate" in facts:
        options["gate"] = gates.setdefault(str(facts["gate"]), Gate())
    return _kinds()[facts["type"]](
        site=Site.parse(facts["site"]),
        op=facts["op"],
        value=tensors.get(f"interventions.{facts['at']}.value"),
        source=tensors.get(f"interventions.{facts['at']}.source"),
        positions=slice(*where["slice"]) if isinstance(where, dict) else where,
        label=facts["label"],
        **options,
    )
