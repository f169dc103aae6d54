"""What an investigation is told: frozen settings, from Python or YAML, that know every one of their keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from headwater.core.errors import MethodError, did_you_mean

STAGES = ("behavior", "localize", "circuit", "heads", "timeline", "data", "do_data", "claims", "act", "report")
OF_HISTORY = ("timeline", "data", "do_data")
"""Stages that need the model's training history; without one they are not run."""
_FOUND = ("behavior", "localize", "circuit", "heads")
NEEDS: dict[str, tuple[str, ...]] = {
    "behavior": (),
    "localize": ("behavior",),
    "circuit": ("behavior", "localize"),
    "heads": ("behavior", "localize"),
    "timeline": _FOUND,
    "data": (*_FOUND, "timeline"),
    "do_data": (*_FOUND, "timeline", "data"),
    "claims": (*_FOUND, *OF_HISTORY),
    "act": (*_FOUND, *OF_HISTORY, "claims"),
    "report": ("behavior",),
}


class Settings(BaseModel):
    """Frozen; an unknown key or a wrong value raises MethodError with what is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    wanted = did_you_mean(str(key), cls.model_fields)
                    raise MethodError(f"unknown setting of {cls._name()}", got=repr(key), wanted=wanted)
        return data

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise MethodError(f"the settings of {self._name()} do not fit", got="; ".join(faults)) from None

    @classmethod
    def _name(cls) -> str:
        section = cls.__name__.removesuffix("Settings").lower()
        return "an investigation" if cls.__name__ == "Investigation" else f"an investigation's section {section!r}"


class LocalizeSettings(Settings):
    """Patching by layer and position on a few pairs; edge attribution on the train pairs."""

    patch_sites: tuple[str, ...] = ("resid_post.*", "attn_out.*", "mlp_out.*")
    """Patched at each of the behavior's named positions."""
    head_sites: tuple[str, ...] = ("head.*.h*@-1",)
    """Patched too: every head where the answer is read."""
    n_patch: int = Field(default=12, ge=1)
    method: Literal["eap", "eap_ig"] = "eap_ig"
    steps: int = Field(default=5, ge=1)
    n_attribution: int = Field(default=60, ge=1)


class CircuitSettings(Settings):
    """How large the circuit is: `edges`, `fraction`, or the smallest that reaches `target` on train pairs."""

    edges: int | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0, le=1)
    target: float = Field(default=0.8, gt=0)
    """Faithfulness to reach on the train pairs, also not overshot by more than what is missing from 1."""
    rank: Literal["abs", "signed"] = "abs"
    how: Literal["topn", "greedy"] = "topn"
    n_choose: int = Field(default=24, ge=1)
    n_test: int = Field(default=40, ge=1)
    fractions: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class HeadsSettings(Settings):
    """Head roles: see `headwater.localize.comparing.heads.HeadsConfig`."""

    top: int = Field(default=3, ge=1)
    least: float = Field(default=0.2, ge=0, le=1)
    sequences: int = Field(default=12, ge=1)
    length: int = Field(default=20, ge=4)
    null_heads: int = Field(default=6, ge=1)
    n_train: int = Field(default=32, ge=1)
    n_test: int = Field(default=32, ge=1)


class TimelineSettings(Settings):
    """When it formed: the checkpoints that are measured, and on how much; see `headwater.dynamics.track`."""

    checkpoints: int | None = Field(default=24, ge=2)
    """At most so many, evenly in log(1 + step); None: all."""
    measures: tuple[str, ...] = ("loss", "behavior", "heads", "circuit")
    n: int = Field(default=100, ge=2)
    """Pairs of each split that are followed through the checkpoints."""
    sequences: int = Field(default=16, ge=1)
    length: int = Field(default=64, ge=2)
    share: float = Field(default=0.8, gt=0.5, lt=1)
    """How much of the change the steps between which something formed must hold, on train pairs."""
    draws: int = Field(default=500, ge=1)
    """Of the bootstrap and of the nulls."""


class DataSettings(Settings):
    """Which data formed it: what is counted, and what that is held against."""

    variables: tuple[str, str] | None = None
    """The behavior's variables whose values are looked for together; None: those that it is known to relate."""
    scope: Literal["document", "window"] = "document"
    window: int | None = Field(default=None, ge=1)
    relations: bool = True
    """Of a world: also hold each relation's linear mechanism against how often its facts were read."""
    checkpoints: int = Field(default=8, ge=2)
    """Of those of the timeline, how many the relations are measured at."""
    n_facts: int = Field(default=60, ge=2)
    """Facts of each relation that its mechanism is judged on, at most."""
    draws: int = Field(default=999, ge=19)


class DoDataSettings(Settings):
    """do(data): the same training once more on other data."""

    how: Literal["auto", "permute", "remove", "none"] = "auto"
    """permute: the frequencies of a world's facts change hands; remove: half of the facts are taken out; none: not."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """The share of the facts that `remove` takes out."""
    seed: int | None = Field(default=None, ge=0)


class ClaimsSettings(Settings):
    """How claims are tested, and how large their nulls are."""

    q: float = Field(default=0.05, gt=0, lt=1)
    sufficient: float = Field(default=0.5, gt=0)
    """Share of the metric's way from counterfactual to clean that a sufficient circuit must carry."""
    n_test: int = Field(default=48, ge=1)
    null_circuits: int = Field(default=59, ge=1)
    """Random circuits of each kind; the smallest p that n of them can give is 1 / (n + 1)."""
    n_null: int = Field(default=12, ge=1)
    """Test pairs on which the null circuits are run: of the commonest lengths."""
    random_sets: int = Field(default=5, ge=1)
    """Random sets of edges whose knock-out that of the circuit is compared with."""
    random_groups: int = Field(default=4, ge=1)
    """Random groups of heads that a group of heads is compared with."""
    n_heads_test: int = Field(default=32, ge=1)
    random_models: int = Field(default=3, ge=1)
    n_random_models: int = Field(default=16, ge=2)


class ActSettings(Settings):
    """What is done with what was found, and on how much it is judged: see `headwater.act.effect`."""

    n: int = Field(default=24, ge=2)
    n_train: int = Field(default=48, ge=2)
    n_search: int = Field(default=16, ge=1)
    """Pairs on which steering vectors are tried."""
    others: tuple[str, ...] | None = None
    """Behaviors that should stay as they are; None: two that this tokenizer can align."""
    n_others: int = Field(default=12, ge=2)
    texts: int = Field(default=4, ge=1)
    text_tokens: int = Field(default=48, ge=8)
    controls: int = Field(default=3, ge=0)
    factor: float = 2.0
    """By how much heads are amplified."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises MethodError for a file that is missing or no mapping."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MethodError("cannot read the investigation's file", got=f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MethodError(
            "the investigation's file is not YAML", got=f"{path}: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(data, dict):
        wanted = "keys and values, such as `behavior: ioi`"
        raise MethodError("the investigation's file holds no settings", got=type(data).__name__, wanted=wanted)
    return {str(key): value for key, value in data.items()}


def with_needs(stages: tuple[str, ...], *, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """These stages and what they need, in order, `without` those that cannot be run. Raises MethodError for an unknown
    one."""
    for stage in stages:
        if stage not in STAGES:
            raise MethodError("unknown stage", got=repr(stage), wanted=did_you_mean(stage, STAGES))
    wanted = {*stages, *(need for stage in stages for need in NEEDS[stage])}
    return tuple(stage for stage in STAGES if stage in wanted and stage not in without)
