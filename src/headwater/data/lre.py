"""Linear relational embeddings: how well one affine map stands for what a model does to decode a relation."""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch

from headwater.behavior import metrics
from headwater.core.errors import BehaviorError, MethodError
from headwater.core.interventions import add, replace
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.data.relations import Relation

if TYPE_CHECKING:
    from headwater.core.model import Model

_BETAS = tuple(i / 4 for i in range(21))


@dataclass(frozen=True, kw_only=True)
class LreConfig:
    """How to fit and judge.

    examples: how many training subjects. layers: after which the subject is read; "embed" is what enters the first;
    None is "embed" and every second one. betas, ranks: what is swept. template: which of the relation's prompts.
    n_test: test subjects at most. known: judge on subjects whose object the model itself says first, as the authors do.
    shown: the training subjects stand in each prompt as examples, as the authors do; else a prompt is the question
    alone, which is what a small model that was trained on such lines has seen.
    """

    examples: int = 8
    layers: tuple[int | str, ...] | None = None
    betas: tuple[float, ...] = _BETAS
    ranks: tuple[int, ...] | None = None
    template: int = 0
    n_test: int = 50
    known: bool = True
    shown: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 2 or self.n_test < 2:
            raise MethodError("an LRE is fitted on two subjects or more, and judged on two or more", got=self.examples)
        if not self.betas or (self.ranks is not None and (not self.ranks or min(self.ranks) < 0)):
            raise MethodError("nothing to sweep", got=f"betas={self.betas}, ranks={self.ranks}")


@register_result
class LreResult(Result):
    """How linear a relation is.

    `tables["sweep"]`: layer, what ("faithfulness" or "causality"), setting (beta, or rank), value, lo, hi, n; with
    layer "embed" as -1. `tables["examples"]`, at the best layer, beta and rank: subject, object, said (by the model),
    lre (said by the map), faithful, target, edited (said after the edit), causal. Facts: relation, layer, beta, rank,
    faithfulness, causality, n, n_known, trained_on. Tensors: weight [D, D], bias [D] of the best layer.
    """

    kind: ClassVar[str] = "lre"
    main: ClassVar[str | None] = "sweep"


@dataclass(frozen=True)
class Lre:
    """z = beta * weight @ h + bias: weight [D, D] the mean Jacobian over training subjects, bias [D] that of z - J h.

    h is the stream at the subject's last token after `layer`, z the stream after the last layer at the prompt's last
    token (before the final norm).
    """

    weight: torch.Tensor
    bias: torch.Tensor
    layer: int | str
    svd: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = field(repr=False)

    def __call__(self, h: torch.Tensor, *, beta: float = 1.0) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return beta * (h @ self.weight.T) + self.bias

    def edit(self, change: torch.Tensor, rank: int) -> torch.Tensor:
        """What to add to h so that z moves by `change` [..., D]: its product with the pseudo-inverse of that rank."""
        u, s, vh = self.svd
        keep = min(rank, int((s > s.max() * 1e-12).sum()))
        return ((change @ u[:, :keep]) / s[:keep]) @ vh[:keep]


@dataclass
class Asked:
    """Prompts. tokens: a tensor a prompt; place: of the subject's last token, from the end."""

    tokens: list[torch.Tensor]
    place: list[int]


def linear_relation(
    model: "Model", relation: Relation | str | Path, *, config: LreConfig | None = None, **options: Any
) -> LreResult:
    """Fit a linear relational embedding and judge it (Hernandez et al., 2024). Options are those of `LreConfig`.

    z = beta W h + b, with W the mean Jacobian over training subjects, each asked with the others as examples. Both
    measures are shares of test subjects, asked after all training examples: faithfulness, where the map says the same
    first token as the model; causality, where h + W^+ (z' - z), W^+ a pseudo-inverse of low rank, makes the model say
    what it says of another subject whose answer differs. Intervals are Wilson's.

    Raises BehaviorError where the relation or what the model knows of it is too small, MethodError for options.
    Known failure: faithfulness is fooled by a model that says one thing always (an untrained one has .98), causality is
    not; best layer, beta and rank are chosen on the same subjects, so the best values are optimistic.
    """
    started = time.monotonic()
    relation = relation if isinstance(relation, Relation) else Relation.load(relation)
    config = configured(LreConfig, config, options)
    if not 0 <= config.template < len(relation.templates):
        raise MethodError(f"{relation.name!r} has no such template", got=config.template)
    layers = _layers(model, config)
    template = relation.templates[config.template]
    samples = shuffled(relation.samples, config.seed)
    train, rest = samples[: config.examples], samples[config.examples :][: config.n_test]
    if len(train) < config.examples or len(rest) < 2:
        raise BehaviorError(
            f"{relation.name!r} is too small", got=len(samples), wanted=f"{config.examples + 2} or more"
        )
    asked = ask(model, relation, rest, train if config.shown else (), template)
    z, said, streams = measure(model, asked, layers)
    first = [first_token(model, o) for _, o in rest]
    right = [i for i in range(len(rest)) if not config.known or first[i] == int(said[i])]
    targets = _targets(right, said, config.seed)
    judged = [i for i in right if i in targets]
    if len(judged) < 2:
        got = f"{len(right)} of {len(rest)} subjects, and {len({int(said[i]) for i in right})} answers to them"
        fix = (
            "Set known=False, or give more samples"
            if config.known
            else "It always says the same; two answers are needed"
        )
        raise BehaviorError(f"{model.name} knows too little of {relation.name!r}", got=got, fix=fix)
    ranks = config.ranks if config.ranks is not None else tuple(range(0, min(model.d_model, 256) + 1, 8))
    rows: list[dict[str, Any]] = []
    maps: dict[int | str, Lre] = {}
    said_by: dict[tuple[str, int | str, float], torch.Tensor] = {}
    goal = torch.tensor([targets[i] for i in judged])
    for layer in track(layers, f"LRE of {relation.name}"):
        maps[layer] = fit(model, relation, train, template, layer, shown=config.shown)
        h = streams[layer]
        for beta in config.betas:
            guess = decode(model, asked, maps[layer](h[judged], beta=beta))
            said_by["faithfulness", layer, beta] = guess
            rows.append(_row(layer, "faithfulness", beta, guess == said[judged]))
        for rank in ranks:
            change = maps[layer].edit(z[goal] - z[judged], rank)
            guess = edited_says(model, asked, judged, layer, change)
            said_by["causality", layer, rank] = guess
            rows.append(_row(layer, "causality", rank, guess == said[goal]))
    best = max(rows, key=lambda row: (row["what"] == "causality", row["value"], -row["setting"]))
    layer: int | str = "embed" if best["layer"] < 0 else best["layer"]
    here = [row for row in rows if row["layer"] == best["layer"] and row["what"] == "faithfulness"]
    faith = max(here, key=lambda row: (row["value"], -abs(row["setting"] - 1)))
    guess, edited = said_by["faithfulness", layer, faith["setting"]], said_by["causality", layer, best["setting"]]
    word = _words(model)
    examples = pl.DataFrame(
        [
            {
                "subject": rest[i][0], "object": rest[i][1], "said": word(said[i]), "lre": word(guess[k]),
                "faithful": bool(guess[k] == said[i]), "target": rest[targets[i]][0], "edited": word(edited[k]),
                "causal": bool(edited[k] == said[targets[i]]),
            }
            for k, i in enumerate(judged)
        ]
    )  # fmt: skip
    facts = {
        "relation": relation.name, "layer": best["layer"], "beta": faith["setting"], "rank": int(best["setting"]),
        "faithfulness": faith["value"], "causality": best["value"], "n": len(judged), "n_known": len(right),
        "trained_on": [s for s, _ in train],
    }  # fmt: skip
    return LreResult(
        tables={"sweep": pl.DataFrame(rows), "examples": examples},
        tensors={"weight": maps[layer].weight, "bias": maps[layer].bias},
        facts=facts,
        config=asdict(config) | {"layers": list(layers), "ranks": list(ranks)},
        provenance=Provenance.collect(model, seed=config.seed, seconds=time.monotonic() - started),
    )


def fit(
    model: "Model",
    relation: Relation,
    train: Sequence[tuple[str, str]],
    template: str,
    layer: int | str,
    *,
    shown: bool = True,
) -> Lre:
    """The map of a layer: Jacobians of z with respect to h on each training subject, the others being its examples
    (without `shown`, each asked alone)."""
    asked = ask(model, relation, train, train if shown else (), template)
    last = f"resid_post.{model.n_layers - 1}"
    site = _site(layer)
    weight, bias = 0.0, 0.0
    for rows in groups(asked):
        ids = torch.stack([asked.tokens[i] for i in rows])
        run = model.run(ids, capture=[site, last], logits="none", grad=True)
        h, z = run[site], run[last][:, -1]
        at = torch.tensor([ids.shape[1] + asked.place[i] for i in rows])
        pick = torch.arange(len(rows))
        jacobian = torch.empty(len(rows), z.shape[-1], h.shape[-1], dtype=torch.float64)
        for d in range(z.shape[-1]):  # prompts of a batch do not touch one another, so a sum gives each its own row
            row = torch.autograd.grad(z[:, d].sum(), h, retain_graph=True)[0]
            jacobian[:, d] = row[pick, at].double().cpu()
        own = h.detach()[pick, at].double().cpu()
        weight = weight + jacobian.sum(0)
        bias = bias + (z.detach().double().cpu() - (jacobian @ own[:, :, None])[:, :, 0]).sum(0)
    mean, offset = torch.as_tensor(weight) / len(train), torch.as_tensor(bias) / len(train)
    u, s, vh = torch.linalg.svd(mean)
    return Lre(weight=mean, bias=offset, layer=layer, svd=(u, s, vh))


def ask(
    model: "Model",
    relation: Relation,
    about: Sequence[tuple[str, str]],
    train: Sequence[tuple[str, str]],
    template: str,
) -> Asked:
    prompts = [relation.prompt(subject, train, template) for subject, _ in about]
    if model.tokenizer is None:
        raise BehaviorError(f"{model.name} has no tokenizer", fix="Load it with tokenizer=")
    tokens = model.tokens([text for text, _, _ in prompts])
    place: list[int] = []
    for (text, _, end), ids in zip(prompts, tokens, strict=True):
        offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        holding = [i for i, (a, b) in enumerate(offsets) if a < end <= b]
        if not holding or len(offsets) != len(ids):
            raise BehaviorError("the tokenizer gives no place to a subject", got=repr(text[-60:]))
        place.append(holding[-1] - len(ids))
    return Asked(tokens, place)


def groups(asked: Asked) -> list[list[int]]:
    """Prompts of one length."""
    by: dict[int, list[int]] = {}
    for number, ids in enumerate(asked.tokens):
        by.setdefault(len(ids), []).append(number)
    return list(by.values())


def measure(
    model: "Model", asked: Asked, layers: Sequence[int | str]
) -> tuple[torch.Tensor, torch.Tensor, dict[int | str, torch.Tensor]]:
    """(z [n, D], first token said [n], h of each layer [n, D]) of every prompt."""
    last, n = f"resid_post.{model.n_layers - 1}", len(asked.tokens)
    z = torch.empty(n, model.d_model, dtype=torch.float64)
    said = torch.empty(n, dtype=torch.long)
    streams = {layer: torch.empty_like(z) for layer in layers}
    for rows in groups(asked):
        ids = torch.stack([asked.tokens[i] for i in rows])
        run = model.run(ids, capture=[last, *map(_site, layers)], logits="last")
        z[rows] = run[last][:, -1].double().cpu()
        said[rows] = run.logits.argmax(-1).cpu()
        at = torch.tensor([ids.shape[1] + asked.place[i] for i in rows])
        for layer in layers:
            streams[layer][rows] = run[_site(layer)][torch.arange(len(rows)), at].double().cpu()
    return z, said, streams


def decode(model: "Model", asked: Asked, z: torch.Tensor) -> torch.Tensor:
    """[n] the first token that the model's own end says of each z [n, D], put in place of the last layer's stream."""
    short = asked.tokens[0][-1:].expand(len(z), 1)
    put = replace(f"resid_post.{model.n_layers - 1}@-1", z)
    return model.run(short, interventions=[put], logits="last").logits.argmax(-1).cpu()


def edited_says(
    model: "Model", asked: Asked, judged: Sequence[int], layer: int | str, change: torch.Tensor
) -> torch.Tensor:
    """[n] what the model says with `change` [n, D] added to h."""
    out = torch.empty(len(judged), dtype=torch.long)
    by: dict[tuple[int, int], list[int]] = {}
    for k, i in enumerate(judged):
        by.setdefault((len(asked.tokens[i]), asked.place[i]), []).append(k)
    for (_, place), rows in by.items():
        ids = torch.stack([asked.tokens[judged[k]] for k in rows])
        moved = add(f"{_site(layer)}@{place}", change[rows])
        out[rows] = model.run(ids, interventions=[moved], logits="last").logits.argmax(-1).cpu()
    return out


def first_token(model: "Model", text: str) -> int:
    """The token with which an object begins, after a space."""
    ids: Any = model.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    return int(ids[0])


def _targets(right: Sequence[int], said: torch.Tensor, seed: int) -> dict[int, int]:
    """For each subject another one of which the model says something else, by chance."""
    chance, found = random.Random(seed), dict[int, int]()
    for i in right:
        other = [j for j in right if int(said[j]) != int(said[i])]
        if other:
            found[i] = chance.choice(other)
    return found


def _layers(model: "Model", config: LreConfig) -> tuple[int | str, ...]:
    layers = config.layers if config.layers is not None else ("embed", *range(0, max(1, model.n_layers - 1), 2))
    for layer in layers:
        if layer != "embed" and (not isinstance(layer, int) or not 0 <= layer < model.n_layers - 1):
            wanted = f'"embed", or 0 to {model.n_layers - 2}'
            raise MethodError(f"no LRE of {model.name} begins there", got=repr(layer), wanted=wanted)
    return tuple(layers)


def _site(layer: int | str) -> str:
    return "embed" if layer == "embed" else f"resid_post.{layer}"


def shuffled(samples: Sequence[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """One sample a subject, in random order."""
    unique = list({subject: (subject, answer) for subject, answer in reversed(samples)}.values())[::-1]
    random.Random(seed).shuffle(unique)
    return unique


def _row(layer: int | str, what: str, setting: float, hits: torch.Tensor) -> dict[str, Any]:
    value, lo, hi = metrics.interval(hits.double().tolist(), share=True)
    where = -1 if layer == "embed" else int(layer)
    return {
        "layer": where, "what": what, "setting": float(setting), "value": value, "lo": lo, "hi": hi, "n": len(hits)
    }  # fmt: skip


def _words(model: "Model") -> Any:
    return lambda token: model.tokenizer.decode([int(token)])  # type: ignore[union-attr]
