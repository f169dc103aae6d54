"""Compression into superposition: the same program in a narrower stream (Lindner et al., 2023).

A matrix W [d_model, narrower] is learned: what is written along direction i is written along row i of W, and reading it
back is reading along the same row. Nothing else changes, so heads and MLPs keep their tasks while their variables share
directions. Scratch keeps one direction of its own: heads and neurons without a task still reach nothing.
"""

import random
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.bench.rasp.compiler import Compiled
from headwater.bench.rasp.language import RaspError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.bench.mechanism import TrueMechanism

_POOL, _SEEN = 192, 64  # inputs of each length that W is learned on, and that it is chosen by


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """d_model: width of the narrower stream, one direction of it for scratch. steps, batch (inputs a step), lr: of
    Adam, whose rate falls to zero along a cosine.

    init: rows of W begin as the stream's principal directions, or random orthonormal ones. stream_weight: what the
    squared error of the stream read back before each half-layer (see `gains`) counts beside the cross-entropy of the
    answers.
    """

    d_model: int
    steps: int = 500
    batch: int = 64
    lr: float = 1e-3
    init: Literal["pca", "random"] = "pca"
    stream_weight: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.d_model < 2 or min(self.steps, self.batch) < 1 or self.lr <= 0 or self.stream_weight < 0:
            raise RaspError(
                "a compress config does not fit",
                got=asdict(self),
                wanted="d_model of at least 2, positive steps and lr",
            )


@register_result
class Compression(Result):
    """How faithful the narrower model is, on fresh inputs of every length.

    `tables["streams"]`: site, cosine (mean over positions between the wide stream and the narrow one read back, along
    the directions that somebody still reads there), error (mean over positions of the largest error along one of them,
    in units of the smallest distance of two values). `tables["curve"]`: step, loss, answers, stream (on inputs that
    W is learned on). `tensors["projection"]`: W. facts: accuracy (share of positions where the narrow model says what
    the interpreter says), accuracy_wide, n (inputs), d_model, d_wide.
    """

    kind: ClassVar[str] = "compression"
    main: ClassVar[str] = "streams"
    _compiled: Compiled | None = None

    @property
    def accuracy(self) -> float:
        return float(self.facts["accuracy"])

    @property
    def compiled(self) -> Compiled:
        """The narrower model, as `compile` gives it, with the known mechanism along its new directions."""
        if self._compiled is None:
            raise RaspError(
                "a report loaded from files holds no model", fix="Call truth.compress again, or save its model"
            )
        return self._compiled


def compress(compiled: Compiled, config: CompressConfig) -> Compression:
    """Learn W for a compiled model. The same config gives the same W on the same machine; seconds to a minute.

    Known failure: attention of sharpness 100 turns an error of 0.05 in a value read back into a factor of e^5, so far
    below the number of directions in use answers are wrong where the stream's cosine is still above 0.99.
    """
    started = time.perf_counter()
    if config.d_model >= compiled.hf.config.hidden_size:
        raise RaspError(
            f"{compiled.name} would not be narrower",
            got=config.d_model,
            wanted=f"below {compiled.hf.config.hidden_size}",
        )
    training = _Training(compiled, config)
    curve = training.run()
    narrow = training.finished()
    made = Compiled(
        name=f"{compiled.name}-{config.d_model}",
        program=compiled.program,
        vocabulary=compiled.vocabulary,
        answers=compiled.answers,
        config=compiled.config,
        hf=narrow,
        tokenizer=compiled.tokenizer,
        mechanism=_moved(compiled.mechanism, training.projection().detach()),
    )
    streams, facts = _judge(compiled, made, training, config)
    result = Compression(
        tables={"streams": streams, "curve": curve},
        tensors={"projection": training.projection().detach()},
        facts=facts,
        config=asdict(config),
        provenance=Provenance.collect(made.model, seed=config.seed, seconds=time.perf_counter() - started),
    )
    result._compiled = made
    return result


class _Training:
    """W's parameters, the wide model they fold, and the narrow one they are folded into."""

    def __init__(self, compiled: Compiled, config: CompressConfig) -> None:
        from headwater.bench.plain import PlainForCausalLM

        self.compiled, self.config = compiled, config
        self.wide: Any = compiled.hf
        first, stop = compiled.mechanism.facts["scratch"]
        self.kept, self.scratch = slice(0, first), slice(first, stop)
        sizes = compiled.hf.config.to_dict() | {"hidden_size": config.d_model}
        with torch.random.fork_rng(devices=[]):
            self.narrow: Any = PlainForCausalLM(type(compiled.hf.config)(**sizes)).eval().requires_grad_(False)
        self.draw = random.Random(f"headwater-compress:{config.seed}")
        self.gains = gains(compiled.mechanism)[:, self.kept]
        # One pool of inputs a length, and what the wide model makes of it, serve all steps.
        lengths = range(1, compiled.config.max_length + 1)
        self.pool = [(ids, *self.wide_streams(ids)) for ids in (self.ids(length, _POOL) for length in lengths)]
        self.weight = self._initial().requires_grad_(True)

    def _initial(self) -> Tensor:
        rows, columns = self.kept.stop, self.config.d_model - 1
        if self.config.init == "random":
            noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(self.config.seed))
            return torch.linalg.qr(noise)[0] if columns <= rows else noise / columns**0.5
        seen = [
            (stream[..., self.kept] * gain).flatten(0, 1)
            for _, streams, _ in self.pool
            for stream, gain in zip(streams, self.gains, strict=True)
        ]
        directions = torch.linalg.svd(torch.cat(seen), full_matrices=True)[2]
        return directions[:columns].T.clone()

    def projection(self) -> Tensor:
        """W [wide, narrow]."""
        whole = torch.zeros(self.scratch.stop, self.config.d_model)
        whole[self.kept, :-1] = self.weight
        whole[self.scratch, -1] = 1.0
        return whole

    def ids(self, length: int, n: int) -> Tensor:
        """[n, length + 1] random inputs."""
        vocabulary = list(self.compiled.vocabulary)
        return torch.tensor(
            [self.compiled.ids([self.draw.choice(vocabulary) for _ in range(length)]) for _ in range(n)]
        )

    def wide_streams(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """(the stream before each half-layer and after the last, [B, T, D] each; logits)."""
        with torch.no_grad():
            return _streams(self.wide, dict(self.wide.named_parameters()), ids)

    def run(self) -> pl.DataFrame:
        """Learn, and keep the W that was best on one part of the pool: hard attention makes steps go far astray."""
        config = self.config
        optimizer = torch.optim.Adam([self.weight], lr=config.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        rows: list[dict[str, float]] = []
        best = float("inf"), self.weight.detach().clone()
        every = max(1, config.steps // 10)
        for step in track(range(config.steps + 1), "compress"):
            if step % every == 0 or step == config.steps:
                with torch.no_grad():
                    parts = [self.loss(ids[:_SEEN], [x[:_SEEN] for x in xs], y[:_SEEN]) for ids, xs, y in self.pool]
                answers, stream = (float(torch.stack(part).mean()) for part in zip(*parts, strict=True))
                loss = answers + config.stream_weight * stream
                rows.append({"step": step, "loss": loss, "answers": answers, "stream": stream})
                best = min(best, (loss, self.weight.detach().clone()), key=lambda found: found[0])
            if step == config.steps:
                break
            ids, streams, logits = self.draw.choice(self.pool)
            some = torch.tensor(self.draw.sample(range(_POOL), min(config.batch, _POOL)))
            answer, distance = self.loss(ids[some], [stream[some] for stream in streams], logits[some])
            optimizer.zero_grad()
            (answer + config.stream_weight * distance).backward()
            torch.nn.utils.clip_grad_norm_([self.weight], 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            self.weight.copy_(best[1])
        return pl.DataFrame(rows)

    def loss(self, ids: Tensor, streams: list[Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy of the wide model's answers, squared error of the stream in units of `gains`)."""
        projection = self.projection()
        own, said = _streams(self.narrow, fold(self.wide, projection), ids)
        wanted = logits[:, 1:].argmax(-1).flatten()
        answers = torch.nn.functional.cross_entropy(said[:, 1:].flatten(0, 1), wanted)
        errors = [
            (((x @ projection.T - y)[..., self.kept]) * gain).square().sum(-1).mean()
            for x, y, gain in zip(own, streams, self.gains, strict=True)
        ]
        return answers, torch.stack(errors).mean()

    def finished(self) -> Any:
        """The narrow model with its weights in place."""
        with torch.no_grad():
            for name, value in fold(self.wide, self.projection()).items():
                self.narrow.get_parameter(name).copy_(value)
        return self.narrow.requires_grad_(True)


def gains(mechanism: "TrueMechanism") -> Tensor:
    """[sites, wide d_model]: how exactly each direction has to be read back at each site; 0 where nobody reads it.

    The sites lie before each half-layer and after the last. A categorical direction counts 1, a numerical one the
    inverse of the smallest distance of two of its values.
    """
    graph, (_, stop) = mechanism.graph, mechanism.facts["scratch"]
    found = torch.zeros(2 * graph.n_layers + 1, stop)

    def time(node: str) -> int:
        layer = graph.layer_of(node.split("<")[0])
        return 2 * layer + (1 if node.startswith("m") else 0)

    last: dict[str, int] = {}
    for target, variable in mechanism.tables["edges"].select("target", "variable").iter_rows():
        last[variable] = max(last.get(variable, -1), time(target))
    for row in mechanism.tables["variables"].iter_rows(named=True):
        written = 0 if row["node"] == "input" else time(row["node"]) + 1
        at = slice(row["first"], row["first"] + row["width"])
        found[written : last.get(row["variable"], -1) + 1, at] = 1.0 / (row["gap"] or 1.0)
    return found


def fold(wide: Any, projection: Tensor) -> dict[str, Tensor]:
    """The wide model's weights with every read and write taken through W: parameters of the narrow model."""
    folded: dict[str, Tensor] = {}
    for name, value in wide.named_parameters():
        value = value.detach()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            folded[name] = projection.T @ value
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            folded[name] = value @ projection
        elif name.endswith(".bias"):
            folded[name] = value
        else:  # embeddings write along their rows; queries, keys, values, neurons and the unembedding read
            folded[name] = value @ projection
    return folded


def _streams(hf: Any, weights: dict[str, Tensor], ids: Tensor) -> tuple[list[Tensor], Tensor]:
    seen: list[Tensor] = []

    def enters(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    hooks = [module.register_forward_pre_hook(enters) for block in hf.layers for module in (block, block.mlp)]
    hooks.append(hf.layers[-1].register_forward_hook(lambda _, args, output: seen.append(output)))
    try:
        logits = torch.func.functional_call(hf, weights, (ids,)).logits
    finally:
        for hook in hooks:
            hook.remove()
    return seen, logits


def _moved(mechanism: "TrueMechanism", projection: Tensor) -> "TrueMechanism":
    """The same mechanism along the narrow model's directions."""
    graph = mechanism.facts["graph"] | {"d_model": projection.shape[1]}
    return type(mechanism)(
        tables=mechanism.tables,
        tensors={"directions": projection, "mask": mechanism.tensors["mask"]},
        facts=mechanism.facts | {"graph": graph},
        config=mechanism.config,
        provenance=mechanism.provenance,
    )


def _judge(
    wide: Compiled, narrow: Compiled, training: _Training, config: CompressConfig
) -> tuple[pl.DataFrame, dict[str, Any]]:
    draw = random.Random(f"headwater-compress-test:{config.seed}")
    longest = wide.config.max_length
    inputs = [[draw.choice(wide.vocabulary) for _ in range(1 + n % longest)] for n in range(60 * longest)]
    sums: list[list[Tensor]] = []
    projection = training.projection().detach()
    for length in range(1, longest + 1):
        ids = torch.tensor([wide.ids(one) for one in inputs if len(one) == length])
        with torch.no_grad():
            streams, _ = training.wide_streams(ids)
            own, _ = _streams(narrow.hf, dict(narrow.hf.named_parameters()), ids)
        measured = []
        for x, y, gain in zip(own, streams, training.gains, strict=True):
            needed = gain > 0
            back, true = (x @ projection.T)[..., training.kept][..., needed], y[..., training.kept][..., needed]
            cosine = torch.nn.functional.cosine_similarity(back, true, dim=-1)[:, 1:].flatten()
            error = ((back - true) * gain[needed]).abs().amax(-1)[:, 1:].flatten()
            measured.append(torch.stack([cosine, error]))
        sums.append(measured)
    rows = []
    for place, parts in enumerate(zip(*sums, strict=True)):
        cosine, error = torch.cat(parts, dim=1).double().mean(dim=1).tolist()
        layer = (place - 1) // 2
        site = "embed" if place == 0 else f"resid_mid.{layer}" if place % 2 else f"resid_post.{layer}"
        rows.append({"site": site, "cosine": cosine, "error": error})
    facts = {
        "accuracy": _accuracy(narrow, inputs),
        "accuracy_wide": _accuracy(wide, inputs),
        "n": len(inputs),
        "d_model": config.d_model,
        "d_wide": int(wide.hf.config.hidden_size),
    }
    return pl.DataFrame(rows), facts


def _accuracy(compiled: Compiled, inputs: list[list[Any]]) -> float:
    """Share of positions where the model says what the interpreter says; inputs without a meaning left out."""
    right = total = 0
    groups: dict[int, list[tuple[list[Any], list[Any]]]] = {}
    for one in inputs:
        try:
            groups.setdefault(len(one), []).append((one, compiled.interpret(one)))
        except RaspError:
            continue
    for group in groups.values():
        for said, (_, meant) in zip(compiled.outputs([one for one, _ in group]), group, strict=True):
            right += sum(x == y for x, y in zip(said, meant, strict=True))
            total += len(meant)
    return right / max(total, 1)
