"""Stage 5: change what was found, and measure what else that changes: knock out, amplify, steer, edit weights, and
Effect beside prompting and random controls."""

from typing import TYPE_CHECKING

from headwater.core.lazy import lazy

_NAMES = {
    "Action": "action",
    "Goal": "action",
    "act": "catalog",
    "methods": "catalog",
    "curves": "strengths",
    "SteeringCurve": "strengths",
    "rewrites": "editing.rewrites",
    "persona_pairs": "steering.persona",
    "export": "exporting",
    "restore": "exporting",
    "grounding": "safety.grounding",
    "head_importance": "safety.importance",
    "known_entities": "safety.entities",
    "cue_groups": "training.cues",
    "pruning_curve": "editing.prune",
    "ActComparison": "comparing.comparison",
    "compare": "comparing.comparison",
    "curate": "curation",
    "relearn": "unlearning.relearning",
    "tasks": "comparing.task",
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
    "ActComparison",
    "Action",
    "Delta",
    "Edit",
    "Effect",
    "Goal",
    "SteeringCurve",
    "act",
    "amplify",
    "applied",
    "compare",
    "cue_groups",
    "curate",
    "curves",
    "effect",
    "export",
    "grounding",
    "head_importance",
    "knock_out",
    "known_entities",
    "methods",
    "persona_pairs",
    "plain_texts",
    "prompt",
    "pruning_curve",
    "relearn",
    "restore",
    "rewrites",
    "steer",
    "tasks",
    "undo",
]


__getattr__, __dir__ = lazy(__name__, _NAMES, __all__)


if TYPE_CHECKING:
    from headwater.act.ablation import amplify, knock_out
    from headwater.act.action import Action, Goal
    from headwater.act.applying import applied, undo
    from headwater.act.catalog import act, methods
    from headwater.act.comparing.comparison import ActComparison, compare
    from headwater.act.comparing.task import tasks
    from headwater.act.curation import curate
    from headwater.act.edit import Delta, Edit
    from headwater.act.editing.prune import pruning_curve
    from headwater.act.editing.rewrites import rewrites
    from headwater.act.effects import Effect, effect
    from headwater.act.exporting import export, restore
    from headwater.act.measuring import plain_texts
    from headwater.act.prompting import prompt
    from headwater.act.safety.entities import known_entities
    from headwater.act.safety.grounding import grounding
    from headwater.act.safety.importance import head_importance
    from headwater.act.steering import steer
    from headwater.act.steering.persona import persona_pairs
    from headwater.act.strengths import SteeringCurve, curves
    from headwater.act.training.cues import cue_groups
    from headwater.act.unlearning.relearning import relearn
