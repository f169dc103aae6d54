"""Stage 5: change what was found, and measure what else that changes: knock out, amplify, steer, edit weights, and
Effect beside prompting and random controls."""

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Action": "action",
    "Goal": "action",
    "Delta": "edit",
    "Edit": "edit",
    "applied": "applying",
    "undo": "applying",
    "Effect": "effects",
    "effect": "effects",
    "amplify": "ablation",
    "knock_out": "ablation",
    "plain_texts": "measuring",
    "prompt": "prompting",
    "steer": "steering",
}

__all__ = [
    "Action",
    "Delta",
    "Edit",
    "Effect",
    "Goal",
    "amplify",
    "applied",
    "effect",
    "knock_out",
    "plain_texts",
    "prompt",
    "steer",
    "undo",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from headwater.act.ablation import amplify, knock_out
    from headwater.act.action import Action, Goal
    from headwater.act.applying import applied, undo
    from headwater.act.edit import Delta, Edit
    from headwater.act.effects import Effect, effect
    from headwater.act.measuring import plain_texts
    from headwater.act.prompting import prompt
    from headwater.act.steering import steer
