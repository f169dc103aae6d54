"""Strict interchange-intervention training (Gupta et al., 2024, after Geiger et al., 2021): weights that a causal graph
explains, because they were trained until it does.

Each step runs a batch of inputs (the behavior loss), then other inputs with nodes swapped for those of the first run:
nodes of the circuit, where the causal graph says what comes out (the interchange loss), and nodes outside it, where the
answer must stay (the strict loss).
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.bench.rasp.words import make_tokenizer
from headwater.bench.siit.alignment import Alignment, align
from headwater.bench.siit.causal import NO_VALUE, CausalGraph, Swap
from headwater.bench.siit.config import SiitConfig
from headwater.bench.siit.swapping import Swapper
from headwater.core.errors import MethodError, StoreError, did_you_mean
from headwater.core.progress import note, track

if TYPE_CHECKING:
    from headwater.core.model import Model


STATE = "training"
"""The folder, in a model's own, of a run that is not done."""


def another_run(name: str, there: Any, wanted: SiitConfig) -> StoreError:
    """The error of a folder that holds the run of another config, naming what differs."""
    known, asked = (dict(one) if isinstance(one, Mapping) else asdict(one) for one in (there, wanted))
    differs = [f"{key}={known.get(key)!r}, not {value!r}" for key, value in asked.items() if known.get(key) != value]
    return StoreError(
        "this folder holds another training run",
        got=f"{name} with {', '.join(differs) or 'another alignment'}",
        fix="Choose a new folder, or train that config",
    )


def causal_graph(config: SiitConfig) -> CausalGraph:
    """The causal graph that a config names. Raises MethodError, with near names, for an unknown one."""
    if config.graph == "ioi":
        from headwater.bench.siit.ioi import IOI

        return IOI()
    from headwater.bench.rasp.library import programs
    from headwater.bench.siit.programs import RaspGraph

    if config.graph not in programs:
        known = did_you_mean(config.graph, ["ioi", *programs.names()], limit=40)
        raise MethodError("unknown causal graph", got=repr(config.graph), wanted=known)
    program = programs.get(config.graph)
    return RaspGraph(program.name, program.make(), program.vocabulary, length=config.length)


def make_model(config: SiitConfig, causal: CausalGraph, *, name: str = "siit") -> "Model":
    """A random transformer of transformers' own, with the words of the causal graph as its vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from headwater.core.model import Model

    tokenizer = make_tokenizer([*causal.vocabulary, *causal.answers])
    size = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": None}
    room = max(16, causal.length + 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.family == "gpt2":
            hf: Any = GPT2LMHeadModel(
                GPT2Config(
                    **size, n_layer=config.n_layers, n_head=config.n_heads, n_embd=config.d_model,
                    n_inner=config.d_mlp, n_positions=room, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                    tie_word_embeddings=False, initializer_range=0.08,
                )
            )  # fmt: skip
        else:
            hf = LlamaForCausalLM(
                LlamaConfig(
                    **size, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
                    num_key_value_heads=config.n_heads, hidden_size=config.d_model, intermediate_size=config.d_mlp,
                    max_position_embeddings=room, tie_word_embeddings=False, initializer_range=0.08,
                )
            )  # fmt: skip
    return Model(hf.eval(), tokenizer, name=name)


class Task:
    """A causal graph beside a transformer that is to compute it: what training and checks share."""

    def __init__(self, causal: CausalGraph, model: "Model", alignment: Alignment) -> None:
        self.causal, self.model, self.alignment = causal, model, alignment
        self.swapper = Swapper(model)
        alignment.check(causal, self.swapper.graph)
        known = model.tokenizer.get_vocab()
        self.input_ids = torch.tensor([known[word] for word in causal.vocabulary])
        self.answer_ids = torch.tensor([known[word] for word in causal.answers])
        self.bos = int(model.tokenizer.bos_token_id)
        self.positions = torch.tensor(causal.positions)
        self.inside = torch.stack([self.swapper.mask(place.nodes) for place in alignment.places])
        outside = alignment.outside(self.swapper.graph)
        self.outside = torch.stack([self.swapper.mask([node]) for node in outside]) if outside else None

    def ids(self, inputs: Tensor) -> Tensor:
        """[B, 1 + T]: the beginning-of-sequence token, then the input."""
        return torch.cat([torch.full((len(inputs), 1), self.bos), self.input_ids[inputs]], dim=1)

    def labels(self, output: Tensor) -> Tensor:
        """[B, P] token ids of the answers at the causal graph's positions; -100 where there is none."""
        at = output[:, self.positions]
        return torch.where(at == NO_VALUE, -100, self.answer_ids[at.clamp(min=0)])

    def read(self, logits: Tensor) -> Tensor:
        """[B, P, V] at the causal graph's positions."""
        return logits[:, 1:][:, self.positions]

    def loss(self, logits: Tensor, output: Tensor) -> Tensor:
        """Mean cross entropy over the answers that there are."""
        labels = self.labels(output)
        if not bool((labels >= 0).any()):
            return logits.sum() * 0.0
        return torch.nn.functional.cross_entropy(self.read(logits).flatten(0, 1), labels.flatten())

    def interchange(self, inputs: Tensor, partners: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(nodes to swap [B, nodes], output of the causal graph after the same swap, output before) for `places`
        [B, places] bool.
        """
        theirs = self.causal.run(partners)
        rows = {
            variable: places[:, index]
            for index, place in enumerate(self.alignment.places)
            for variable in place.variables
        }
        after = self.causal.run(inputs, Swap(values=theirs, rows=rows))[self.causal.output]
        before = self.causal.run(inputs)[self.causal.output]
        broken = (theirs[self.causal.output] == NO_VALUE)[:, self.positions].any(dim=1)
        after = torch.where(broken[:, None], NO_VALUE, after)
        return (places.float() @ self.inside.float()) > 0, after, before


def losses(task: Task, config: SiitConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The three losses of one batch, each with its gradient: `behavior`, `iit`, `strict`."""
    half, rest = config.batch // 2, config.batch - config.batch // 2
    inputs = task.causal.sample(config.batch, generator)
    partners = task.causal.partners(inputs, generator)
    logits, writes = task.swapper.record(task.ids(partners))
    places = draw_places(half, len(task.alignment.places), generator)
    rows, after, _ = task.interchange(inputs[:half], partners[:half], places)
    own = task.causal.run(inputs[half:])[task.causal.output]
    strict = draw_outside(task, rest, config.both, generator)
    swapped = task.swapper.swapped(task.ids(inputs), writes, torch.cat([rows, strict]))
    return {
        "behavior": task.loss(logits, task.causal.run(partners)[task.causal.output]),
        "iit": task.loss(swapped[:half], after),
        "strict": task.loss(swapped[half:], own),
    }


def draw_places(n: int, places: int, generator: torch.Generator) -> Tensor:
    """[n, places] bool: one place a row, and in a third of the rows each other one as a coin falls."""
    one = torch.nn.functional.one_hot(torch.randint(places, (n,), generator=generator), places).bool()
    more = torch.rand(n, places, generator=generator) < 0.5
    several = torch.rand(n, 1, generator=generator) < 1 / 3
    return one | (more & several)


def draw_outside(task: Task, n: int, both: float, generator: torch.Generator) -> Tensor:
    """[n, nodes] bool: one node outside the circuit a row, or (a share of `both`) all of them."""
    nodes = task.inside.shape[1]
    which = torch.rand(n, 1, generator=generator)
    if task.outside is None:
        return torch.zeros(n, nodes, dtype=torch.bool)
    one = task.outside[torch.randint(len(task.outside), (n,), generator=generator)]
    return torch.where(which < both, task.outside.any(dim=0)[None], one)


class Training:
    """One run: the model as it is now, AdamW's state, and the random numbers yet to come."""

    def __init__(self, config: SiitConfig, *, name: str = "siit", alignment: Alignment | None = None) -> None:
        self.config = config
        causal = causal_graph(config)
        model = make_model(config, causal, name=name)
        alignment = alignment or align(causal, n_heads=config.n_heads, seed=config.align_seed, n_layers=config.n_layers)
        self.task = Task(causal, model, alignment)
        self.step, self.passed, self.seconds = 0, 0, 0.0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.weights = [weight for weight in model.hf.parameters()]
        for weight in self.weights:
            weight.requires_grad_(True)
        self.average = [weight.detach().clone() for weight in self.weights]
        self.adam = torch.optim.AdamW(
            self.weights, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98), foreach=True
        )
        self.history: list[dict[str, float]] = []

    def run(self, folder: Path | None = None, *, stop_at: int | None = None) -> bool:
        """Train until the checks pass or the steps are used up; True where they passed. With a `folder` the state is
        kept there at every check. `stop_at`: leave after this step, to go on later.
        """
        from headwater.bench.siit.checks import quick_check

        config, last = self.config, min(self.config.steps, stop_at or self.config.steps)
        started = time.monotonic()
        for _ in track(range(self.step, last), f"siit {config.graph}"):
            if self.passed >= config.patience:
                break
            found = self._step()
            if self.step % config.check_every == 0 or self.step == config.steps:
                with self.averaged():
                    seen = quick_check(self.task, config.check_rows, seed=config.seed + self.step)
                good = seen["iia"] >= config.enough and seen["outside"] <= config.quiet
                self.passed = self.passed + 1 if good and seen["accuracy"] >= config.enough else 0
                self.history.append({"step": float(self.step), **found, **seen})
                note("  " + ", ".join(f"{key} {value:.4g}" for key, value in self.history[-1].items()))
                if folder is not None:
                    self.seconds += time.monotonic() - started
                    started = time.monotonic()
                    self.save(folder)
        self.seconds += time.monotonic() - started
        return self.passed >= config.patience

    def _step(self) -> dict[str, float]:
        config = self.config
        self.step += 1
        warm = min(1.0, self.step / 50)
        for group in self.adam.param_groups:
            group["lr"] = config.lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * self.step / config.steps)))
        found = losses(self.task, config, self.generator)
        total = config.behavior * found["behavior"] + config.iit * found["iit"] + config.strict * found["strict"]
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        share = min(config.average, self.step / (self.step + 10))  # at first the random weights must be forgotten fast
        with torch.no_grad():
            for mean, weight in zip(self.average, self.weights, strict=True):
                mean.lerp_(weight, 1 - share)
        return {name: float(value.detach()) for name, value in found.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, for a while."""
        own = [weight.detach().clone() for weight in self.weights]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    def finish(self) -> None:
        """End of training: the averaged weights stay, and none asks for a gradient any more."""
        self._put(self.average)
        for weight in self.weights:
            weight.requires_grad_(False)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    # --- going on later

    def save(self, folder: Path) -> None:
        """Write the state into `folder/training`, by one rename."""
        import safetensors.torch

        from headwater.core.files import to_json, whole_folder, write_bytes

        tensors = {f"weight.{i}": weight.detach().clone() for i, weight in enumerate(self.weights)}
        tensors |= {f"average.{i}": mean.clone() for i, mean in enumerate(self.average)}
        for index, weight in enumerate(self.weights):
            for key, value in self.adam.state.get(weight, {}).items():
                tensors[f"adam.{index}.{key}"] = torch.as_tensor(value).clone()
        tensors["random"] = self.generator.get_state()
        head = {
            "config": asdict(self.config),
            "alignment": self.task.alignment.to_list(),
            "step": self.step,
            "passed": self.passed,
            "seconds": self.seconds,
            "history": self.history,
        }
        with whole_folder(folder / STATE, replaces="state.json") as temporary:
            write_bytes(temporary / "state.safetensors", safetensors.torch.save(tensors))
            write_bytes(temporary / "state.json", to_json(head).encode())

    def resume(self, folder: Path) -> bool:
        """Take up the state in `folder/training`; False where there is none. Raises StoreError for another config's."""
        import safetensors.torch

        from headwater.core.files import read_json

        path = folder / STATE
        if not (path / "state.json").is_file():
            return False
        head: Mapping[str, Any] = read_json(path / "state.json", what="the state of a training run")
        if head.get("config") != asdict(self.config) or head.get("alignment") != self.task.alignment.to_list():
            raise another_run(str(folder), head.get("config") or {}, self.config)
        try:
            tensors = safetensors.torch.load((path / "state.safetensors").read_bytes())
            self._put([tensors[f"weight.{index}"] for index in range(len(self.weights))])
            self.average = [tensors[f"average.{index}"] for index in range(len(self.weights))]
            for index, weight in enumerate(self.weights):
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.adam.state[weight] = {key: tensors[f"adam.{index}.{key}"] for key in keys}
            self.generator.set_state(tensors["random"])
        except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise StoreError(
                f"the training run in {folder} is damaged",
                got=f"{type(error).__name__}: {error}",
                fix=f"Remove its folder `{STATE}` and start again",
            ) from error
        self.step, self.passed = int(head["step"]), int(head["passed"])
        self.seconds, self.history = float(head["seconds"]), list(head["history"])
        return True


__all__ = ["Task", "Training", "causal_graph", "draw_outside", "draw_places", "losses", "make_model"]
