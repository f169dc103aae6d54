"""ROME: one fact is written into one MLP by a change of rank one."""

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta, Edit
from headwater.act.editing.closed import insert, ridged
from headwater.act.editing.facts import FactConfig, read_facts, subject_inputs, wanted_change
from headwater.act.editing.making import as_action
from headwater.act.editing.moments import second_moments
from headwater.act.editing.parts import down_projection, written
from headwater.core.methods import configured
from headwater.core.progress import track

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class RomeConfig(FactConfig):
    """Options of `FactConfig`, and layer: whose MLP is edited (None: a third of the depth)."""

    layer: int | None = None


@methods.register("rome")
def rome(model: "Model", behavior: "Behavior", *, config: RomeConfig | None = None, **options: Any) -> Action:
    """Write facts into one MLP by changes of rank one (Meng et al., 2022): rank-one model editing.

    Each training pair is a fact. Its key is the mean of the layer's neurons at the subject's last token, over contexts;
    its value is the MLP's output there, changed until the model says the target's first token; the change of the
    down-projection is the smallest, in the second moment of keys over a corpus, that maps the key to the value exactly.
    Several facts are written one after the other. Options are those of `RomeConfig`. Known failure: the fact holds for
    wordings near the edited one and not for what follows from it, and many facts in one matrix wear it out.

    Raises MethodError for models without such MLPs, pairs without the named subject, or an unreadable corpus.
    """
    used = configured(RomeConfig, config, options)
    layer = round(model.n_layers / 3) if used.layer is None else used.layer
    matrix = down_projection(model, layer)
    facts = read_facts(model, behavior, used)
    moment = ridged(
        second_moments(model, [layer], used.corpus, tokens=used.corpus_tokens, cache=used.cache)[layer], used.ridge
    )
    deltas: list[Delta] = []
    passes = 0
    with ExitStack() as before:
        for at, fact in enumerate(track(facts, "facts")):
            keys = subject_inputs(model, fact, f"neurons.{layer}").cpu()
            weight = matrix.weight.double().cpu()
            outputs = keys @ weight.T + (0 if matrix.bias is None else matrix.bias.double().cpu())
            length = float(outputs[0].norm())
            adding = functools.partial(written, matrix.module)
            change = wanted_change(model, fact, used, weight.shape[0], length, adding)
            deltas.append(matrix.low_rank(*insert(keys.mean(0), change, moment)))
            passes += len(fact.tokens) * (1 + 2 * used.steps)
            if at + 1 < len(facts):  # the next fact is written into what this one leaves
                before.enter_context(Edit.of(model, f"fact {at}", deltas[-1:]).applied(model))
    goal = Goal(direction="raise" if used.target == "answers" else "lower")
    name = f"rome at m{layer}: {len(facts)} fact{'s'[: len(facts) != 1]}"
    return as_action(model, name, deltas, goal, passes, method="rome", layer=layer, facts=[one.prompt for one in facts])
