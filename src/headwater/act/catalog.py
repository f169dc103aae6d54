"""Ways to act on a model, by name: those of this room, and those that outside packages add by entry point."""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headwater.core.methods import Methods

if TYPE_CHECKING:
    from headwater.act.action import Action

_OWN = (
    "steering.caa",
    "steering.pca",
    "steering.probe",
    "steering.given",
    "steering.affine",
    "steering.ablate",
    "steering.turn",
    "steering.conditional",
    "steering.persona",
    "safety.grounding",
    "safety.entities",
    "editing.rome",
    "editing.memit",
    "editing.rank_one",
    "editing.heads",
    "editing.values",
    "editing.repair",
    "editing.orthogonalize",
    "editing.recalibrate",
    "editing.prune",
    "training.finetune",
    "training.lora",
    "training.gates",
    "training.dpo",
    "training.cues",
    "training.connectivity",
    "unlearning.difference",
    "unlearning.rmu",
)

Method = Callable[..., "Action"]
"""method(model, behavior, **options) -> Action."""

methods: Methods[Method] = Methods("action", own=[f"headwater.act.{module}" for module in _OWN])
"""Outside packages add theirs by the entry point group `headwater.actions`."""
described = methods.described


def act(method: str, model: Any, behavior: Any, **options: Any) -> "Action":
    """The action that a method makes for a behavior of a model, with the seconds that it took. Raises MethodError."""
    started = time.perf_counter()
    made = methods.get(method)(model, behavior, **options)
    return dataclasses.replace(made, seconds=time.perf_counter() - started)
