"""What an action is measured on: a behavior's pairs, and plain text."""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from headwater.act.action import Action
from headwater.behavior.bind import TokenTable
from headwater.behavior.metrics import metric
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound, Group
    from headwater.core.model import Model

Floats = NDArray[np.float64]
_TEXT_BATCH = 4  # texts a forward: all their logits are held at once
NOTHING = Action(name="as it is")


def main_metric(behavior: Behavior) -> str:
    """The metric that an action is judged by: the behavior's own where it is a difference of answer and foil."""
    if behavior.metric in ("logit_diff", "prob_diff"):
        return behavior.metric
    return "logit_diff" if all(len(foils) for foils in behavior.frame["foils"].to_list()) else "prob_diff"


def said(name: str, logits: torch.Tensor, group: "Group") -> torch.Tensor:
    """[B]: a metric of a group's pairs, from their logits [B, V], on whatever device those are."""
    return metric(name)(logits, group.answers.to(logits.device), group.foils.to(logits.device))


def score(model: "Model", bound: "Bound", action: Action, metrics: Iterable[str]) -> pl.DataFrame:
    """id and one column a metric, for each pair, under `action`.

    Pairs that a prefix makes too long for the model are left out. Raises SiteError where the action needs a named
    position that these pairs lack.
    """
    if action.edit is not None:
        with action.edited(model) as rest:
            return score(model, bound, rest, metrics)
    if action.prefix:
        bound = prefixed(bound, action.prefix).bind(model)
    ids = bound.behavior.frame["id"].to_list()
    columns: dict[str, list[float]] = {name: [] for name in metrics}
    rows: list[str] = []
    for group in bound.groups:
        run = model.run(group.clean, logits="last", interventions=action.interventions, positions=group.positions)
        rows += [ids[row] for row in group.rows]
        for name, values in columns.items():
            values += said(name, run.logits, group).double().tolist()
    return pl.DataFrame({"id": rows, **columns}).sort("id")


def prefixed(bound: "Bound", prefix: str) -> Behavior:
    """The bound pairs with `prefix` before prompt and counterfactual; named positions move along."""

    def moved(text: str) -> str:
        return json.dumps(
            {name: [first + len(prefix), past + len(prefix)] for name, (first, past) in json.loads(text).items()}
        )

    frame = bound.frame.with_columns(
        (pl.lit(prefix) + pl.col("prompt")).alias("prompt"),
        (pl.lit(prefix) + pl.col("counterfactual")).alias("counterfactual"),
        pl.Series("positions", [moved(text) for text in bound.frame["positions"].to_list()], dtype=pl.String),
    )
    own = bound.behavior
    return Behavior(frame.drop("alternatives", strict=False), name=own.name, metric=own.metric, about=own.about)


def plain_texts() -> list[str]:
    """Twelve short paragraphs of everyday English prose, written for this package and taken from nowhere (Apache-2.0):
    no model knows them by heart."""
    return _paragraphs((files("headwater.act") / "data" / "plain_text.txt").read_text(encoding="utf-8"))


def texts_of(text: str | Sequence[str] | None) -> list[str]:
    """The texts to measure perplexity on: None means `plain_texts()`, one text is cut at its empty lines."""
    if text is None:
        return plain_texts()
    found = _paragraphs(text) if isinstance(text, str) else [one for one in text if one.strip()]
    if not found:
        raise MethodError("no text to measure perplexity on", got=repr(text)[:60], wanted="a text or texts")
    return found


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def first_tokens(model: "Model", texts: Sequence[str], tokens: int) -> list[torch.Tensor]:
    """The first `tokens` token ids of each text, and no more than the model's context holds."""
    if model.tokenizer is None:
        return [row[:tokens].cpu() for row in model.tokens(list(texts))]  # tells what is lacking
    # Not model.tokens: a text may be longer than the context before it is cut.
    limit = min(tokens, model.max_length or tokens)
    return [torch.as_tensor(row[:limit], dtype=torch.long) for row in model.tokenizer(list(texts))["input_ids"]]


def lacks_words(model: "Model", text: str) -> bool:
    """Whether a text holds words that the model's tokenizer does not know."""
    return model.tokenizer is not None and TokenTable(model.tokenizer).lacks(text)


def text_loss(model: "Model", texts: Sequence[str], action: Action, *, tokens: int = 64) -> Floats:
    """Mean cross-entropy in nats a token of each text [n], over its first `tokens` tokens (as many as the model reads)
    but the first.

    An action's interventions hold on all tokens but the first; a prefix goes before each text and is not scored.
    `exp(mean)` is the perplexity. Texts of fewer than two tokens are refused.
    """
    if action.edit is not None:
        with action.edited(model) as rest:
            return text_loss(model, texts, rest, tokens=tokens)
    if any(lacks_words(model, text) for text in texts):
        raise MethodError("the tokenizer lacks words of the texts", fix="Give texts of its own words")
    ids = first_tokens(model, texts, tokens)
    if min(map(len, ids)) < 2:
        raise MethodError("a text is too short to measure perplexity on", wanted="at least two tokens")
    head = torch.empty(0, dtype=torch.long)
    scored = 1  # where in a row the scored tokens begin
    if action.prefix:
        head = model.tokens(action.prefix)[0].cpu()
        if int(head[0]) == getattr(model.tokenizer, "bos_token_id", None) == int(ids[0][0]):
            ids = [row[1:] for row in ids]  # the prefix begins the text already
            scored = 0
        scored += len(head)
    losses = np.zeros(len(ids))
    everywhere = action.everywhere().interventions
    for length in sorted({len(row) for row in ids}):
        some = [i for i, row in enumerate(ids) if len(row) == length]
        for start in range(0, len(some), _TEXT_BATCH):
            part = some[start : start + _TEXT_BATCH]
            rows_BT = torch.stack([torch.cat([head, ids[i]]) for i in part])
            logits_BTV = model.run(rows_BT, interventions=everywhere).logits[:, scored - 1 : -1]
            logits_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
            targets_BT = rows_BT[:, scored:].to(logits_BTV.device)
            loss_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
            losses[part] = loss_BT.double().mean(1).cpu().numpy()
    return losses
