"""The measures of a comparison: each a share or a ratio, the same for every action."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.act.action import Action
from headwater.act.comparing.task import ROLES, Task
from headwater.act.effects import others_of
from headwater.act.measuring import NOTHING, lacks_words, score, text_loss
from headwater.act.unlearning.latent import lens, most, probe
from headwater.act.unlearning.relearning import relearn
from headwater.core.errors import HeadwaterError

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

EFFICACY, PARAPHRASE, FORMAT, NEIGHBOUR = "efficacy", "paraphrase", "format", "neighbours"
ROLE_NAMES: dict[str, str] = dict(zip([*ROLES], (EFFICACY, PARAPHRASE, FORMAT, NEIGHBOUR), strict=True))
SCORED = (EFFICACY, PARAPHRASE, FORMAT, NEIGHBOUR)
MEASURES: dict[str, str] = {
    "score": "harmonic mean of efficacy, paraphrase, format and neighbours, of those that the task has",
    EFFICACY: "share of the target pairs that are as the goal wants",
    PARAPHRASE: "the same, asked in other words",
    FORMAT: "the same, asked in another form",
    NEIGHBOUR: "share of what should stay that is right",
    "others": "accuracy on other behaviors",
    "perplexity": "perplexity on plain text, as a multiple of the model's own",
    "after relearning": "share of held target pairs that are as the goal wants after a few of the others were trained "
    "back",
    "probe": "share of the target pairs whose old answer a linear probe tells from a wrong one; chance is a half",
    "lens": "share of the target pairs whose old answer wins after some layer, the best one",
    "weights": "weights that may change",
    "tokens": "tokens before each prompt",
    "prompts to find": "prompts run to find it",
    "seconds": "seconds to find it",
}
HIGHER = frozenset({"score", *SCORED, "others", "after relearning"})
LOWER = frozenset({"perplexity", "probe", "lens"})


class Bench:
    """A task bound to a model once: every action is measured on the same pairs."""

    def __init__(
        self,
        model: "Model",
        task: Task,
        others: Sequence[Any] | None,
        texts: list[str],
        n_others: int,
        text_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.task, self.seed = model, task, seed
        self._text_tokens = text_tokens
        self.bound: dict[str, Bound] = {}
        self.notes: dict[str, str] = {}
        for role, behavior in task.measured().items():
            try:
                self.bound[role] = behavior.bind(model)
            except HeadwaterError as error:
                if role == "target":
                    raise
                self.notes[ROLE_NAMES[role]] = _first(error)
        self._others: list[Bound] = []
        try:
            self._others = others_of(model, task.behavior, others, n_others, seed)
            if not self._others:
                self.notes["others"] = "the tokenizer fits none of the usual behaviors"
        except HeadwaterError as error:
            self.notes["others"] = _first(error)
        self._texts = [text for text in texts if not lacks_words(model, text)]
        self._loss: float | None = None

    def measure(self, action: Action, *, steps: Sequence[int], attack: dict[str, Any], latent: bool) -> dict[str, Any]:
        """measure -> value, or a note (text) that says why there is none; "curve": what relearning gave."""
        found: dict[str, Any] = dict(self.notes)
        self._own_loss()  # of the model without the action
        model, wanted_low = self.model, self.task.goal.direction == "lower"
        with action.edited(model) as rest:
            for role, bound in self.bound.items():
                value = self._share(bound, rest, self.task.goal if role != "neighbour" else None)
                found[ROLE_NAMES[role]] = value
            if self._others:
                shares = [self._share(bound, rest, None) for bound in self._others]
                known = [one for one in shares if not isinstance(one, str)]
                found["others"] = float(np.mean(known)) if known else shares[0]
            found["perplexity"] = self._perplexity(rest)
        asked = [ROLE_NAMES[role] for role in self.bound]
        lacking = [name for name in asked if not isinstance(found[name], float)]
        # A mean of fewer shares would not compare with one of all.
        found["score"] = (
            f"not all of it was measured: {', '.join(lacking)}" if lacking else harmonic([found[one] for one in asked])
        )
        if steps and self.task.old is not None:
            found |= self._relearned(action, self.task.old, steps, attack, wanted_low)
        if latent and self.task.old is not None and self.task.known is not None and not action.prefix:
            side = "answers" if wanted_low else "foils"
            found["probe"] = most(probe(model, action, self.task.old.train, self.task.known, side=side))
            found["lens"] = most(lens(model, action, self.task.old.train, side=side))
        found["weights"] = float(action.edit.n_weights(model)) if action.edit is not None else 0.0
        found["tokens"] = float(len(model.tokens(action.prefix)[0])) if action.prefix else 0.0
        found["prompts to find"] = float(action.passes)
        found["seconds"] = action.seconds
        return found

    def efficacy(self, action: Action) -> float | str:
        """The efficacy alone."""
        with action.edited(self.model) as rest:
            return self._share(self.bound["target"], rest, self.task.goal)

    def _share(self, bound: "Bound", action: Action, goal: Any) -> float | str:
        """The share of pairs that are as the goal wants: of the answer beating its foils, or not, pair by pair."""
        try:
            found = score(self.model, bound, action, ["accuracy"])
        except HeadwaterError as error:
            return _first(error)
        frame = bound.behavior.frame.join(found, on="id", how="inner", maintain_order="left")
        if not frame.height:
            return "no pair is left"
        right = frame["accuracy"].to_numpy()
        signs = goal.signs(frame, part=True) if goal is not None else np.ones(len(right))
        return float(np.where(signs > 0, right, 1 - right).mean())

    def _perplexity(self, action: Action) -> float | str:
        if not self._texts:
            return "the tokenizer lacks the words of plain text"
        try:
            loss = float(text_loss(self.model, self._texts, action, tokens=self._text_tokens).mean())
        except HeadwaterError as error:
            return _first(error)
        if self._loss is None:
            return "the model itself cannot read the texts"
        return math.exp(min(50.0, loss - self._loss))

    def _own_loss(self) -> None:
        if self._loss is None and self._texts:
            try:
                losses = text_loss(self.model, self._texts, NOTHING, tokens=self._text_tokens)
            except HeadwaterError:
                return
            self._loss = float(losses.mean())

    def _relearned(
        self, action: Action, old: "Behavior", steps: Sequence[int], attack: dict[str, Any], low: bool
    ) -> dict[str, Any]:
        if action.edit is None:
            return {"after relearning": "it changes no weights"}
        try:
            table = relearn(self.model, action, old, steps=steps, seed=self.seed, **attack)
        except HeadwaterError as error:
            return {"after relearning": _first(error)}
        curve = [
            {**row, "attained": 1 - row["accuracy"] if low else row["accuracy"]}
            for row in table.select("step", "part", "accuracy", "n").iter_rows(named=True)
        ]
        last = [row for row in curve if row["part"] == "held"][-1]
        return {"after relearning": last["attained"], "curve": curve}


def harmonic(values: Sequence[float]) -> float:
    """The harmonic mean of shares; 0 where one of them is 0."""
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def _first(error: Exception) -> str:
    return str(error).split(". ")[0][:120]
