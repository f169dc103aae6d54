"""What each head writes of a token that it attends to, as logits: copy suppression and succession."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.interventions import replace
from headwater.dynamics.measures.base import Probe, Row, measures, row

if TYPE_CHECKING:
    from headwater.core.model import Model

TOKENS, CANDIDATES = 64, 1000
LOWEST = 0.05
_SERIES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    " ".join(map(str, range(100))),
)


@measures.register("copy_suppression")
def copy_suppression(probe: Probe) -> list[Row]:
    """Copy suppression (McDougall et al., 2023), its half that lies in the values: for what share of random tokens a
    head that attends to the token pushes just this token's logit into the lowest 5% of all (chance .05); every head,
    and the most of any. Read as the direct effect, through the final norm, of the token after the first layer.

    Known failure: it says what a head would write, not that it attends to what the model is about to say; a head that
    writes against everything common does well too. Ablating it on text where it attends settles the matter.
    """
    model, generator = probe.model, torch.Generator().manual_seed(probe.seed)
    usable = _usable(model)
    order = usable[torch.randperm(len(usable), generator=generator)]
    tokens, candidates = order[:TOKENS], order[:CANDIDATES]
    found: list[list[float]] = []
    for logits in direct_logits(model, tokens, candidates):
        own = logits.diagonal(dim1=1, dim2=2)  # the candidates begin with the tokens
        # ties count half: a head that writes nothing suppresses nothing
        below = (logits < own[:, :, None]).double().mean(dim=2) + 0.5 * (logits == own[:, :, None]).double().mean(dim=2)
        found.append((below < LOWEST).double().mean(dim=1).tolist())
    return _by_head(found)


@measures.register("successor")
def successor(probe: Probe) -> list[Row]:
    """Succession (Gould et al., 2023): for what share of the words of known series (days, months, numbers, ordinals,
    letters; as far as they are single tokens) the next word gets the highest logit of its series from a head that
    attends to the word; every head, and the most of any.

    Known failure: a head may map all words alike to one that happens to follow; with few words in a series chance is
    high (one in their number).
    """
    series = [_single(probe.model, text.split()) for text in _SERIES]
    series = [words for words in series if len(words) > 2]
    if not series:
        raise MethodError("no known series has single tokens in this vocabulary", wanted="days, months, numbers, ...")
    right = torch.zeros(probe.model.n_layers, probe.model.n_heads, dtype=torch.float64)
    n = 0
    for words in series:
        for layer, logits in enumerate(direct_logits(probe.model, words, words)):
            said = logits[:, :-1].argmax(dim=2)
            right[layer] += (said == torch.arange(1, len(words))).double().sum(dim=1)
        n += len(words) - 1
    return _by_head((right / n).tolist())


def direct_logits(model: "Model", tokens: Tensor, candidates: Tensor) -> "list[Tensor]":
    """A tensor [H, n, candidates] a layer: what each head adds to the candidates' logits when it attends to one of
    `tokens` [n] alone, float32, on the CPU.

    The token is given as it is after the first layer (its effective embedding; heads of the first layer read the token
    itself), standing after a random other; the head's write goes through the derivative of the final norm at the
    token's own last stream, and the unembedding. Raises MethodError for a model without an unembedding.
    """
    unembed = model.anatomy.unembed
    if unembed is None:
        raise MethodError(f"{model.name} has no unembedding to read a head's write by")
    last = model.n_layers - 1
    usable = _usable(model)
    before = usable[torch.randint(len(usable), (len(tokens),), generator=torch.Generator().manual_seed(0))]
    run = model.run(torch.stack([before, tokens], dim=1), capture=["resid_post.0", f"resid_post.{last}"], logits="none")
    effective, final = run["resid_post.0"][:, 1:], run[f"resid_post.{last}"][:, 1]
    weight: Tensor = unembed.weight.detach()  # type: ignore[assignment, operator]
    weight = weight[candidates.to(weight.device)]
    found: list[Tensor] = []
    for layer in range(model.n_layers):
        put = [replace(f"resid_pre.{layer}", effective)] if layer else []
        # alone in its sequence, a token is all that a head can attend to
        alone = model.run(tokens[:, None], capture=f"head.{layer}", interventions=put, logits="none")
        written = alone[f"head.{layer}"][:, 0].transpose(0, 1)  # [H, n, D]
        found.append((_through_norm(model, final, written).to(weight.dtype) @ weight.T).float().cpu())
    return found


def _through_norm(model: "Model", at: Tensor, written: Tensor) -> Tensor:
    """[H, n, D]: writes at streams [n, D] after the derivative of the final norm there."""
    norm = model.anatomy.main.final_norm
    if norm is None:
        return written
    # a central difference, whatever the norm is; many compute in float32 inside, so the step cannot be smaller
    exact = copy.deepcopy(norm).double()
    at, written = at.double(), written.double()
    step = 3e-3 * at.norm(dim=-1) / written.norm(dim=-1).clamp(min=1e-30)
    with torch.inference_mode():
        moved = exact(at + step[..., None] * written) - exact(at - step[..., None] * written)
    return moved / (2 * step[..., None])


def _usable(model: "Model") -> Tensor:
    special: set[int] = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    return torch.tensor([token for token in range(model.d_vocab) if token not in special])


def _single(model: "Model", words: list[str]) -> Tensor:
    """Ids of the first words of a series, up to the first that is no single token; after a space where that is one."""
    if model.tokenizer is None:
        return torch.tensor([], dtype=torch.long)
    best: list[int] = []
    for space in (" ", ""):
        found: list[int] = []
        for word in words:
            ids = model.tokenizer(space + word, add_special_tokens=False)["input_ids"]
            # a vocabulary of words says an unknown one by some other token
            if len(ids) != 1 or model.tokenizer.decode(ids).strip() != word:
                break
            found.append(ids[0])
        best = found if len(found) > len(best) else best
    return torch.tensor(best, dtype=torch.long)


def _by_head(found: list[list[float]]) -> list[Row]:
    rows = [row("max", max(value for layer in found for value in layer))]
    return rows + [
        row(f"a{layer}.h{head}", value) for layer, values in enumerate(found) for head, value in enumerate(values)
    ]
