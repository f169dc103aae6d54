"""What training reads: prompts with the answers that should come, in batches of equal length."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.act.action import Goal
from headwater.act.measuring import first_tokens
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """ids: [T] a prompt and what comes after it. start: the first token that is learned."""

    ids: Tensor
    start: int


def wanted(model: "Model", behavior: "Behavior", goal: Goal, *, part: bool = False) -> list[Example]:
    """The training pairs with what the goal wants: the answer where the metric should rise, the foil where it should
    fall. `part`: as for `Goal.signs`."""
    return _examples(model, behavior, goal, wanted=True, part=part)


def unwanted(model: "Model", behavior: "Behavior", goal: Goal, *, part: bool = False) -> list[Example]:
    """The same prompts with the other side. Raises MethodError where a pair has none."""
    return _examples(model, behavior, goal, wanted=False, part=part)


def to_keep(model: "Model", keep: "Behavior | str | None") -> list[Example]:
    """The training pairs of what is to stay, with their answers; none where nothing is given."""
    from headwater.behavior import make
    from headwater.behavior.table import Behavior

    if keep is None:
        return []
    if not isinstance(keep, str | Behavior):
        got = type(keep).__name__
        raise MethodError("what is kept is a behavior", got=got, wanted="a Behavior, its name, or a file of pairs")
    return wanted(model, make(keep) if isinstance(keep, str) else keep, Goal())


def _examples(model: "Model", behavior: "Behavior", goal: Goal, *, wanted: bool, part: bool) -> list[Example]:
    bound = behavior.train.bind(model)
    signs = goal.signs(bound.frame, part=part)
    prompts, whole = [], []
    for row, sign in zip(bound.frame.to_dicts(), signs, strict=True):
        side = "answers" if (sign > 0) == wanted else "foils"
        if not row[side]:
            raise MethodError(f"a pair of {behavior.name!r} has no {side}", got=repr(row["prompt"]))
        prompts.append(row["prompt"])
        whole.append(row["prompt"] + row[side][0])
    starts = [len(ids) for ids in model.tokens(prompts)]
    return [Example(ids=ids.cpu(), start=start) for ids, start in zip(model.tokens(whole), starts, strict=True)]


def texts(model: "Model", some: Sequence[str], tokens: int) -> list[Example]:
    """Plain texts, of which every token but the first is learned."""
    return [Example(ids=ids, start=1) for ids in first_tokens(model, some, tokens) if len(ids) > 1]


def draws(n: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Numbers of the examples of each step, without end: each once before any comes again."""
    random = np.random.default_rng(seed)
    queue: list[int] = []
    while True:
        while len(queue) < min(batch, n):
            queue += random.permutation(n).tolist()
        yield [queue.pop(0) for _ in range(min(batch, n))]


def batches(
    examples: Sequence[Example], some: Sequence[int], device: Any
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(numbers, ids [B, T], learned [B, T]) for each length among `some` of the examples."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for number in some:
        lengths[len(examples[number].ids)].append(number)
    for length, numbers in sorted(lengths.items()):
        ids_BT = torch.stack([examples[number].ids for number in numbers]).to(device)
        starts_B = torch.tensor([examples[number].start for number in numbers], device=device)
        yield numbers, ids_BT, torch.arange(length, device=device) >= starts_B[:, None]


def log_probability(hf: nn.Module, ids_BT: Tensor, learned_BT: Tensor) -> Tensor:
    """[B]: log-probability in nats of the learned tokens of each row, added up."""
    logits_BTV = hf(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    logits_BTV = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    said_BT = -nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return (said_BT * learned_BT[:, 1:]).sum(1)


def mean_loss(hf: nn.Module, ids_BT: Tensor, learned_BT: Tensor) -> Tensor:
    """[B]: mean cross-entropy in nats a learned token of each row."""
    return -log_probability(hf, ids_BT, learned_BT) / learned_BT[:, 1:].sum(1)
