"""What is measured of every checkpoint, by name: each a function of a `Probe` that gives rows.

    @measures.register("my_measure")
    def my_measure(probe: Probe) -> list[Row]:
        return [row("", some_number(probe.model))]

A measure may also `probe.keep` tensors, and have an `across` (see `acrosses`) that compares what was kept over steps.
Intervals are 95%, over sequences or prompts.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.interventions import replace
from headwater.core.registry import Registry
from headwater.core.repeats import attention_on_random_tokens, repeated_tokens

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Row = dict[str, Any]
Measure = Callable[["Probe"], "list[Row]"]
Across = Callable[["dict[int, dict[str, Tensor]]"], "dict[int, list[Row]]"]
# Measures with a file of their own, imported when a name is asked for: they import this module.
_OWN = ("headwater.dynamics.grokking",)


class Measures(Registry[Measure]):
    """Measures by name."""

    def get(self, name: str) -> Measure:
        self._import_own()
        return super().get(name)

    def names(self) -> list[str]:
        self._import_own()
        return super().names()

    def _import_own(self) -> None:
        for module in _OWN:
            importlib.import_module(module)


measures = Measures("measure")
"""Outside packages add theirs by the entry point group `headwater.measures`."""
acrosses: dict[str, Across] = {}
"""Name of a measure -> what compares the tensors that it kept, {step: tensors} -> {step: rows}."""
_LOGITS_AT_ONCE = 1 << 26  # 256 MB
_LENS_TOKENS = 16  # sequences for measures that run once a layer


def row(name: str, value: float, lo: float | None = None, hi: float | None = None) -> Row:
    """One number of a measure; `name` says which of several."""
    return {"name": name, "value": float(value), "lo": lo, "hi": hi}


@dataclass(frozen=True, eq=False, kw_only=True)
class Forward:
    """losses, guesses [n, T - 1]: of predicting each token after the first; streams: layer -> [n, T, D] after it."""

    losses: Tensor
    guesses: Tensor
    streams: dict[int, Tensor]


@dataclass(eq=False)
class Probe:
    """One checkpoint, and what it is measured on.

    behavior: pairs, or None. ids: token sequences [n, T], or None. loss_at: [T] bool, which of their tokens are
    predicted. seed: of everything random. trained: the sequences [n, T] of one round of a run's training data, where
    the series is a run of the lab and they are few. kept: tensors for comparisons over steps.
    """

    model: "Model"
    step: int
    behavior: "Behavior | None" = None
    ids: Tensor | None = None
    loss_at: Tensor | None = None
    seed: int = 0
    trained: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, tensor: Tensor) -> None:
        self.kept[name] = tensor.detach().cpu().contiguous()

    @property
    def pairs(self) -> "Behavior":
        if self.behavior is None:
            raise MethodError("this measure needs a behavior", fix="track(..., behavior=...), or --behavior")
        return self.behavior

    @property
    def sequences(self) -> Tensor:
        """[n, T] token ids."""
        if self.ids is None:
            raise MethodError("this measure needs sequences of tokens", fix="track(..., tokens=...), or --text FILE")
        return self.ids

    @functools.cached_property
    def forward(self) -> "Forward":
        """The model on the sequences, run once for all measures, a few sequences at a time: logits are large."""
        ids, layers = self.sequences, range(self.model.n_layers)
        at_once = max(1, _LOGITS_AT_ONCE // (ids.shape[1] * max(1, self.model.d_vocab)))
        losses: list[Tensor] = []
        guesses: list[Tensor] = []
        streams: list[list[Tensor]] = [[] for _ in layers]
        for part in ids.split(at_once):
            run = self.model.run(part, capture="resid_post.*")
            losses.append(_losses(run.logits.float(), part.to(run.logits.device)).cpu())
            guesses.append(run.logits[:, :-1].argmax(dim=-1).cpu())
            for layer in layers:
                streams[layer].append(run[f"resid_post.{layer}"].float().cpu())
        kept = {layer: torch.cat(streams[layer]) for layer in layers}
        return Forward(losses=torch.cat(losses), guesses=torch.cat(guesses), streams=kept)

    @property
    def losses(self) -> Tensor:
        """[n, T - 1] nats: the loss of predicting each token after the first."""
        return self.forward.losses

    @property
    def predicted(self) -> Tensor:
        """[T - 1] bool: which of those count."""
        length = self.sequences.shape[1]
        return torch.ones(length - 1, dtype=torch.bool) if self.loss_at is None else self.loss_at[1:]


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    flat = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


def _over(name: str, values: Tensor, *, share: bool = False) -> Row:
    """The mean of one number a sequence, with its interval."""
    from headwater.behavior.metrics import interval

    return row(name, *interval(values.double().tolist(), share=share))


@measures.register("loss")
def loss(probe: Probe) -> list[Row]:
    """Mean loss on the sequences, nats a token, and the share of tokens predicted right."""
    at = probe.predicted
    right = (probe.forward.guesses == probe.sequences.cpu()[:, 1:]).float()
    return [_over("", probe.losses[:, at].mean(dim=1)), _over("accuracy", right[:, at].mean(dim=1))]


@measures.register("behavior")
def behavior(probe: Probe) -> list[Row]:
    """The behavior's metrics: logit_diff, prob_diff and accuracy, over its pairs."""
    from headwater.behavior.evaluate import evaluate

    names = ("logit_diff", "prob_diff", "accuracy")
    report = evaluate(probe.model, probe.pairs, metrics=names, canary=False, seed=probe.seed)
    return [row(name, *report.interval(name)) for name in names]


@measures.register("canary")
def canary(probe: Probe) -> list[Row]:
    """The multiple-choice canary (Wiegreffe et al., 2025): accuracy asked plainly, with options, with the answer told.

    An answer that is known before the format is: the two come at different steps. Nothing where no pair can be put so.
    """
    from headwater.behavior.canary import canary as ask

    table = ask(probe.model, probe.pairs, seed=probe.seed)
    plain = [one for one in table.to_dicts() if "," not in one["condition"]]
    return [row(f"{one['format']}, {one['condition']}", one["accuracy"], one["lo"], one["hi"]) for one in plain]


@measures.register("heads")
def heads(probe: Probe) -> list[Row]:
    """Attention of every head to the token before, the same token and the one after it, on random tokens said twice
    (Olsson et al., 2022); and the most that any head gives to each.

    Known failure: it is where heads look, not what they do there.
    """
    found = attention_on_random_tokens(probe.model, seed=probe.seed)
    rows: list[Row] = []
    for role, values in found.items():
        rows.append(row(f"{role} max", float(values.max())))
        for layer, per_head in enumerate(values.tolist()):
            rows += [row(f"{role} a{layer}.h{head}", value) for head, value in enumerate(per_head)]
    return rows


@measures.register("icl")
def icl(probe: Probe) -> list[Row]:
    """In-context learning (Olsson et al., 2022): how much lower the loss is late in the context than early.

    `repeat`: on random tokens said twice, loss in the second half minus the first. `late`: on the sequences, where
    there are any, the last tenth of the predicted tokens minus the first tenth (published: token 500 minus token 50).
    """
    ids = repeated_tokens(probe.model, seed=probe.seed)
    lost = _losses(probe.model.run(ids).logits.float().cpu(), ids)
    half = ids.shape[1] // 2
    rows = [_over("repeat", lost[:, half:].mean(dim=1) - lost[:, : half - 1].mean(dim=1))]
    if probe.ids is not None:
        at = probe.losses[:, probe.predicted]
        tenth = max(1, at.shape[1] // 10)
        if at.shape[1] >= 2:
            rows.append(_over("late", at[:, -tenth:].mean(dim=1) - at[:, :tenth].mean(dim=1)))
    return rows


@measures.register("weight_norms")
def weight_norms(probe: Probe) -> list[Row]:
    """L2 norm of all weights, of the embeddings, and of each layer."""
    model = probe.model
    rows = [row("all", _norm(model.hf.parameters()))]
    rows.append(row("embedding", _norm(model.hf.get_input_embeddings().parameters())))
    return rows + [row(f"layer {one.index}", _norm(one.module.parameters())) for one in model.anatomy.main.blocks]


def _norm(weights: Iterable[Tensor]) -> float:
    return float(torch.stack([weight.detach().double().square().sum() for weight in weights]).sum().sqrt())


@measures.register("collapse")
def collapse(probe: Probe) -> list[Row]:
    """Representation collapse (Gopalani and Hu, 2025): mean cosine between the streams of two predicting tokens of a
    sequence, after each layer. 1: all positions look alike."""
    rows: list[Row] = []
    for layer, stream in probe.forward.streams.items():
        unit = torch.nn.functional.normalize(stream[:, :-1][:, probe.predicted], dim=-1)
        n = unit.shape[1]
        if n < 2:
            raise MethodError("collapse compares positions, and one token a sequence is predicted", fix="Leave it out")
        total = unit.sum(dim=1).square().sum(dim=-1)  # the sum over all ordered pairs, each with itself among them
        rows.append(_over(f"layer {layer}", (total - unit.square().sum(dim=(1, 2))) / (n * (n - 1))))
    return rows


@measures.register("repetition")
def repetition(probe: Probe) -> list[Row]:
    """Repetition bias (Gopalani and Hu, 2025): how often the model's best guess is its guess of one token before; and
    how often (`truth`) the right token is the one before."""
    at = probe.predicted
    guess, right = probe.forward.guesses[:, at], probe.sequences.cpu()[:, 1:][:, at]
    if guess.shape[1] < 2:
        raise MethodError("repetition compares guesses, and one token a sequence is predicted", fix="Leave it out")
    return [
        _over(name, (said[:, 1:] == said[:, :-1]).float().mean(dim=1)) for name, said in (("", guess), ("truth", right))
    ]


@measures.register("lens_depth")
def lens_depth(probe: Probe) -> list[Row]:
    """Depth at which the final guess is made (logit lens, nostalgebraist, 2020): the first layer from which on the
    stream, read by the model's own final norm and unembedding, gives it; as a share of all layers, mean over tokens.

    Read by putting the stream of a layer in place of the last one's, so it holds for any architecture.
    """
    ids, at = probe.sequences[:_LENS_TOKENS], probe.predicted
    final, streams = probe.forward.guesses[: len(ids), at], probe.forward.streams
    depth, last = torch.full(final.shape, probe.model.n_layers), probe.model.n_layers - 1
    stays = torch.ones_like(final, dtype=torch.bool)
    for layer in range(last, -1, -1):
        if layer < last:
            put = replace(f"resid_post.{last}", streams[layer][: len(ids)].to(probe.model.device))
            guess = probe.model.run(ids, interventions=[put]).logits[:, :-1].argmax(dim=-1).cpu()[:, at]
            stays &= guess == final
        depth = torch.where(stays, layer + 1, depth)
    return [_over("", depth.float().mean(dim=1) / probe.model.n_layers)]


@measures.register("cka")
def cka(probe: Probe) -> list[Row]:
    """Linear CKA (Kornblith et al., 2019) of each layer's stream with that of the step before, and of the last step."""
    for layer, stream in probe.forward.streams.items():
        flat = stream[:, :-1][:, probe.predicted].flatten(0, 1)
        places = torch.linspace(0, len(flat) - 1, min(len(flat), 512)).long()
        probe.keep(f"cka.{layer}", flat[places])
    return []


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear CKA of two representations [N, D] of the same N tokens: 1 up to rotation, scale and shift; NaN where one
    is constant."""
    a, b = (x.double() - x.double().mean(dim=0) for x in (a, b))
    cross = (a.T @ b).square().sum()
    own = (a.T @ a).norm() * (b.T @ b).norm()
    return float(cross / own) if float(own) > 0 else float("nan")


def _across_cka(kept: dict[int, dict[str, Tensor]]) -> dict[int, list[Row]]:
    steps = sorted(kept)
    out: dict[int, list[Row]] = {step: [] for step in steps}
    for before, step in zip([None, *steps], steps, strict=False):
        own = [name for name in kept[step] if name.startswith("cka.")]
        for name in sorted(own, key=lambda name: int(name.removeprefix("cka."))):
            layer, mine = name.removeprefix("cka."), kept[step][name]
            for what, other in (("before", before), ("last", steps[-1])):
                theirs = kept.get(other, {}).get(name) if other is not None else None
                if theirs is not None and theirs.shape == mine.shape:
                    out[step].append(row(f"{what}, layer {layer}", linear_cka(mine, theirs)))
    return out


acrosses["cka"] = _across_cka
