"""MEMIT: many facts at once, spread over several MLPs by least squares."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta, Edit
from headwater.act.editing.closed import least_squares, ridged
from headwater.act.editing.facts import FactConfig, read_facts, subject_inputs, wanted_change
from headwater.act.editing.making import as_action
from headwater.act.editing.moments import second_moments
from headwater.act.editing.parts import check_direct, down_projection
from headwater.core.errors import MethodError
from headwater.core.interventions import add
from headwater.core.methods import configured
from headwater.core.progress import track

if TYPE_CHECKING:
    from collections.abc import Generator

    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class MemitConfig(FactConfig):
    """Options of `FactConfig`, and layers: whose MLPs are edited (None: five that end at 45% of the depth); preserve:
    how much the moments of other keys weigh against the facts."""

    facts: int = 100
    layers: tuple[int, ...] | None = None
    preserve: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise MethodError("MEMIT takes layers in order, each once", got=self.layers)
        if self.preserve <= 0:
            raise MethodError("preserve is above 0", got=self.preserve)


@methods.register("memit")
def memit(model: "Model", behavior: "Behavior", *, config: MemitConfig | None = None, **options: Any) -> Action:
    """Write many facts into several MLPs by least squares (Meng et al., 2023): mass-editing memory.

    For each training pair the stream after the last edited layer, at the subject's last token, is changed until the
    model says the target's first token. Layer by layer, each takes an equal share of what is still lacking: the change
    of its down-projection is the least-squares solution between these shares and leaving other keys, in their second
    moment over a corpus, as they are. Options are those of `MemitConfig`. Known failure: neighbors of the edited
    subjects drift as facts grow in number, and `preserve` trades the one for the other.

    Raises MethodError as `rome` does, and for models with a norm between MLP and stream.
    """
    used = configured(MemitConfig, config, options)
    layers = _layers(model, used)
    facts = read_facts(model, behavior, used)
    if not facts:
        raise MethodError("no fact to write", wanted="training pairs that bind to this model")
    moments = second_moments(model, layers, used.corpus, tokens=used.corpus_tokens, cache=used.cache)
    last = f"resid_post.{layers[-1]}"

    @contextmanager
    def adding(change: Tensor, rows: Tensor, places: Tensor) -> "Generator[None]":
        with model.intervene(add(last, change, positions=places)):
            yield

    wanted = []
    for fact in track(facts, "facts"):
        now = subject_inputs(model, fact, last)[0].cpu()
        change = wanted_change(model, fact, used, model.d_model, float(now.norm()), adding)
        wanted.append(now + change)
    deltas: list[Delta] = []
    with ExitStack() as before:
        for at, layer in enumerate(layers):
            matrix = down_projection(model, layer)
            keys = torch.stack([subject_inputs(model, fact, f"neurons.{layer}").mean(0).cpu() for fact in facts], 1)
            now = torch.stack([subject_inputs(model, fact, last)[0].cpu() for fact in facts], 1)
            lacking = (torch.stack(wanted, 1) - now) / (len(layers) - at) / matrix.scale
            moment = used.preserve * ridged(moments[layer], used.ridge)
            deltas.append(matrix.low_rank(*least_squares(keys, lacking, moment)))
            if at + 1 < len(layers):
                before.enter_context(Edit.of(model, f"layer {layer}", deltas[-1:]).applied(model))
    goal = Goal(direction="raise" if used.target == "answers" else "lower")
    passes = sum(len(fact.tokens) for fact in facts) * (2 * used.steps + 2 * len(layers))
    name = f"memit at m{layers[0]} to m{layers[-1]}: {len(facts)} fact{'s'[: len(facts) != 1]}"
    told = {"method": "memit", "layers": layers, "facts": [one.prompt for one in facts]}
    return as_action(model, name, deltas, goal, passes, **told)


def _layers(model: "Model", used: MemitConfig) -> list[int]:
    last = round(0.45 * model.n_layers)
    layers = list(used.layers) if used.layers is not None else list(range(max(0, last - 4), last + 1))
    for layer in layers:
        down_projection(model, layer)
        check_direct(model, layer, "mlp_out", fix="Use rome, which looks at the MLP's own output")
    return layers
