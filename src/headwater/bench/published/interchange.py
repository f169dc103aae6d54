"""What the published benchmarks share: pairs of prompts, a subspace at a site, and what swapping it does.

An interchange intervention runs the base prompt with the part of its state that lies in a subspace taken from the
source prompt. `full` takes the whole vector; the other subspaces are fitted on training vectors and their labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headwater.core.errors import BehaviorError, MethodError
from headwater.core.interventions import replace, swap_subspace
from headwater.core.model import Model

METHODS = ("full", "pca", "mean", "probe", "random")


@dataclass(frozen=True, kw_only=True)
class Interchange:
    """One interchange: two prompts, where in each, and what the model should say.

    base_end, source_end: characters up to which the position reaches (its last token is meant); None is the last token.
    answer: what the base prompt alone should be followed by; source_answer: the same of the source prompt, where that
    is known; expected: what the base prompt should be followed by after the swap. label, source_label: what the fitted
    subspaces should tell apart. group: which part of the score it counts for.
    """

    base: str
    source: str
    answer: str
    expected: str
    base_end: int | None = None
    source_end: int | None = None
    label: str = ""
    source_label: str = ""
    source_answer: str | None = None
    group: str = ""
    details: dict[str, Any] = field(default_factory=dict[str, Any])


def positions(model: Model, prompts: Sequence[str], ends: Sequence[int | None]) -> torch.Tensor:
    """The index of the token that holds the last character before each end [N]. Raises BehaviorError where there is
    none."""
    found = []
    for prompt, end, ids in zip(prompts, ends, model.tokens(list(prompts)), strict=True):
        if end is None:
            found.append(len(ids) - 1)
            continue
        spans = model.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        covering = [i for i, (first, past) in enumerate(spans) if first < end <= past]
        if not covering:
            raise BehaviorError("a position falls on no token", got=f"character {end} of {prompt!r}")
        found.append(covering[-1])
    return torch.tensor(found)


def first_token(model: Model, prompt: str, text: str) -> int | None:
    """The first token of `text` as it follows the prompt; None where it does not follow as a token of its own."""
    before, after = (model.tokenizer(one)["input_ids"] for one in (prompt, prompt + text))
    if len(after) <= len(before) or after[: len(before)] != before:
        return None
    return int(after[len(before)])


def vectors(model: Model, site: str, prompts: Sequence[str], where: torch.Tensor) -> torch.Tensor:
    """What the site holds at one position of each prompt [N, width]."""
    run = model.run(list(prompts), capture=[f"{site}@here"], positions={"here": where}, logits="none")
    return run[f"{site}@here"].float()


def swapped(
    model: Model,
    site: str,
    pairs: Sequence[Interchange],
    basis: torch.Tensor | None,
    *,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits at the end of each base prompt [N, V], with the subspace (None: the whole vector) taken from its source.

    A basis of no rows changes nothing. source: the source vectors [N, width], where they are known already.
    """
    bases = [pair.base for pair in pairs]
    if basis is not None and not len(basis):
        return model.run(bases, logits="last").logits.float()
    at = positions(model, bases, [pair.base_end for pair in pairs])
    if source is None:
        source = source_vectors(model, site, pairs)
    edit = replace(site, source, positions=at) if basis is None else swap_subspace(site, source, basis, positions=at)
    return model.run(bases, logits="last", interventions=[edit]).logits.float()


def source_vectors(model: Model, site: str, pairs: Sequence[Interchange]) -> torch.Tensor:
    """The source prompts' vectors at their positions [N, width]."""
    texts = [pair.source for pair in pairs]
    return vectors(model, site, texts, positions(model, texts, [pair.source_end for pair in pairs]))


def base_vectors(model: Model, site: str, pairs: Sequence[Interchange]) -> torch.Tensor:
    """The base prompts' vectors at their positions [N, width]."""
    texts = [pair.base for pair in pairs]
    return vectors(model, site, texts, positions(model, texts, [pair.base_end for pair in pairs]))


def fit_subspace(
    method: str, x: torch.Tensor, labels: Sequence[str], *, rank: int = 1, seed: int = 0
) -> torch.Tensor | None:
    """An orthonormal basis [R, width] of the subspace a baseline proposes; None for the whole vector.

    full: everything · pca: the `rank` directions of largest variance · mean: the span of the differences of class means
    (for two classes the difference in means; at most `rank` directions of the largest spread) · probe: the span of the
    weights of a multinomial logistic regression · random: `rank` random directions. x [N, width], one label a row.
    Where the classes do not differ at all, mean and probe have no direction: a basis of no rows. Raises MethodError.

    Known failure: with more directions than training rows every fitted subspace is noise.
    """
    if method == "full":
        return None
    if method not in METHODS:
        raise MethodError("unknown subspace", got=repr(method), wanted=", ".join(METHODS))
    if not 1 <= rank <= x.shape[1]:
        raise MethodError("a subspace of impossible rank", got=rank, wanted=f"1 to {x.shape[1]}")
    x = x.double()
    centered = x - x.mean(0)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(rank, x.shape[1], generator=generator, dtype=torch.float64)
        return torch.linalg.qr(rows.T)[0].T.float()
    if method == "pca":
        return torch.linalg.svd(centered, full_matrices=False)[2][:rank].float()
    names = sorted(set(labels))
    if len(names) < 2:
        raise MethodError(f"the subspace {method!r} needs two classes", got=names)
    index = torch.tensor([names.index(label) for label in labels])
    if method == "mean":
        means = torch.stack([x[index == i].mean(0) for i in range(len(names))])
        rows = means - means.mean(0)
    else:
        rows = _probe(centered, index, len(names))
        rows = rows - rows.mean(0)
    _, spread, axes = torch.linalg.svd(rows, full_matrices=False)
    kept = min(rank, int((spread > 1e-8 * spread[0]).sum()))
    return axes[:kept].float()


def _probe(x: torch.Tensor, index: torch.Tensor, n: int, *, penalty: float = 1e-2) -> torch.Tensor:
    """Weights [classes, width] of a logistic regression on standardized x, in the units of x."""
    scale = x.std(0).clamp(min=1e-6)
    weights = torch.zeros(n, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy((x / scale) @ weights.T + bias, index)
        loss = loss + penalty * weights.square().mean(1).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach() / scale


def known(model: Model, pairs: Sequence[Interchange]) -> list[bool]:
    """Whether the model's likeliest next token begins the right answer to both prompts (a source without an answer is
    not asked)."""
    if not pairs:
        return []
    right = _answers(model, [pair.base for pair in pairs], [pair.answer for pair in pairs])
    asked = [i for i, pair in enumerate(pairs) if right[i] and pair.source_answer is not None]
    if asked:
        answers = [str(pairs[i].source_answer) for i in asked]
        for i, hit in zip(asked, _answers(model, [pairs[i].source for i in asked], answers), strict=True):
            right[i] = hit
    return right


def _answers(model: Model, prompts: list[str], answers: list[str]) -> list[bool]:
    said = model.run(prompts, logits="last").logits.argmax(-1).tolist()
    wanted = [first_token(model, *both) for both in zip(prompts, answers, strict=True)]
    return [a == b for a, b in zip(said, wanted, strict=True)]
