"""Facts to edit: prompts with their subject's place, contexts around them, and what a layer should give instead."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from headwater.act.editing.parts import frozen
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Target = Literal["answers", "foils"]
# What may stand before a prompt: a fact should hold after any of it.
CONTEXTS = ("", "It was a long day. ", "As everybody knows, ", "Here is something to remember. ", "In other news: ")


@dataclass(frozen=True, kw_only=True)
class FactConfig:
    """How facts are found and written.

    subject: the named position whose last token is edited at. target: whether each pair's answers or its foils are to
    be said. facts: training pairs at most. corpus, corpus_tokens: what the keys' second moments are taken over (a text
    file; None: the package's few paragraphs). ridge: its share of their mean that is added on the diagonal. steps,
    rate: of the search for the value. decay: how strongly a large change of the value is held back; drift: likewise a
    change of what is said of the subject otherwise. limit: the change's length at most, in lengths of what it changes.
    cache: another folder for the moments.
    """

    subject: str = "subject"
    target: Target = "answers"
    facts: int = 8
    corpus: str | None = None
    corpus_tokens: int = 10_000
    ridge: float = 0.01
    steps: int = 25
    rate: float = 0.5
    decay: float = 0.05
    drift: float = 0.0625
    limit: float = 4.0
    cache: str | None = None

    def __post_init__(self) -> None:
        counts, above = (self.facts, self.steps, self.corpus_tokens), (self.rate, self.limit)
        if min(counts) < 1 or min(above) <= 0 or min(self.ridge, self.decay, self.drift) < 0:
            wanted = "counts of at least 1, rate and limit above 0, ridge, decay and drift not below"
            raise MethodError("facts with steps, a rate and a limit are needed", got=self, wanted=wanted)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fact:
    """One fact. tokens: contexts and prompt, a row each; places: the subject's last token in each, from the end;
    target: the token to be said; essence: "<subject> is", what else is said of it."""

    prompt: str
    tokens: list[Tensor]
    places: list[int]
    target: int
    essence: Tensor


def read_facts(model: "Model", behavior: "Behavior", config: FactConfig) -> list[Fact]:
    """The training pairs as facts, in their order. Raises MethodError where a position or a target is lacking."""
    bound = behavior.train.bind(model)
    if config.subject not in bound.positions:
        fix = "Name one with subject=, or use a behavior that names its subjects"
        raise MethodError(f"no position {config.subject!r} in {behavior.name}", got=bound.positions, fix=fix)
    found: dict[int, Fact] = {}
    prompts = behavior.train.prompts  # what a group's rows count: also the pairs that were dropped
    for group in bound.groups:
        targets = group.answers if config.target == "answers" else group.foils
        for at, row in enumerate(group.rows):
            if int(targets[at, 0]) < 0:
                raise MethodError(f"a pair has no {config.target} to write", got=prompts[row])
            prompt = prompts[row]
            place = int(group.positions[config.subject][at])
            tokens, places = _in_contexts(model, prompt, group.clean[at].cpu(), place)
            found[row] = Fact(
                prompt=prompt,
                tokens=tokens,
                places=places,
                target=int(targets[at, 0]),
                essence=group.clean[at, : place + 1].cpu(),
            )
    return [found[row] for row in sorted(found)][: config.facts]


def _in_contexts(model: "Model", prompt: str, plain: Tensor, place: int) -> tuple[list[Tensor], list[int]]:
    """The prompt after each context that leaves its tokens from the subject on as they are."""
    tail = len(plain) - place
    rows = [plain, *(model.tokens(context + prompt)[0].cpu() for context in CONTEXTS[1:])]
    kept = [row for row in rows if len(row) >= len(plain) and torch.equal(row[len(row) - tail :], plain[place:])]
    return kept, [-tail] * len(kept)


def subject_inputs(model: "Model", fact: Fact, site: str) -> Tensor:
    """[contexts, width] float64: what a site holds at the subject's last token, after each context."""
    runs = [model.run(tokens[None], capture=[site], logits="none")[site][0] for tokens in fact.tokens]
    return torch.stack([run[place].double() for run, place in zip(runs, fact.places, strict=True)])


def wanted_change(
    model: "Model",
    fact: Fact,
    config: FactConfig,
    width: int,
    length: float,
    adding: Callable[[Tensor, Tensor, Tensor], AbstractContextManager[None]],
) -> Tensor:
    """[width]: what must be added at the subject's last token for the target to be said.

    It minimizes the mean surprisal of the target over contexts, plus `drift` KL(as it is || changed) of what follows
    the subject itself, plus `decay` |change|^2 / length^2; its length is at most `limit` times `length`.
    `adding(change, rows, places)` puts it into the forward. By Adam, as its authors do; the best of its steps is kept.
    """
    dtype, device = model.dtype, model.device
    change = torch.zeros(width, dtype=dtype, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=config.rate)
    lengths = sorted({len(row) for row in fact.tokens})
    batches = []
    for n in lengths:
        rows = [(row, place) for row, place in zip(fact.tokens, fact.places, strict=True) if len(row) == n]
        places = torch.tensor([n + place for _, place in rows], device=device)
        batches.append((torch.stack([row for row, _ in rows]).to(device), places))
    essence = fact.essence[None].to(device)
    end = torch.tensor([essence.shape[1] - 1], device=device)
    n_rows = len(fact.tokens)
    with frozen(model.hf), torch.enable_grad():
        with torch.no_grad():
            before = torch.log_softmax(model.hf(input_ids=essence).logits[0, -1], -1)
        best, found = float("inf"), change.detach().clone()
        for _ in range(config.steps):
            optimizer.zero_grad()
            loss = config.decay * change.square().sum() / length**2
            for ids, places in batches:
                with adding(change, torch.arange(len(ids), device=device), places):
                    said = torch.log_softmax(model.hf(input_ids=ids).logits[:, -1], -1)
                loss = loss - said[:, fact.target].sum() / n_rows
            if config.drift:
                with adding(change, torch.zeros(1, dtype=torch.long, device=device), end):
                    after = torch.log_softmax(model.hf(input_ids=essence).logits[0, -1], -1)
                loss = loss + config.drift * (before.exp() * (before - after)).sum()
            if float(loss.detach()) < best:  # the last one may have overshot
                best, found = float(loss.detach()), change.detach().clone()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                most = config.limit * length
                if float(change.norm()) > most:
                    change.mul_(most / change.norm())
    if not float(change.detach().norm()) > 0:
        raise MethodError(
            "nothing that is changed there reaches the answer",
            got=f"the subject of {fact.prompt!r}",
            fix="Edit an earlier layer: after the last one no token reads another's stream",
        )
    if not float(found.norm()) > 0:
        raise MethodError("no change says the target better", got=fact.prompt, fix="Take a lower rate or more steps")
    return found.double().cpu()
