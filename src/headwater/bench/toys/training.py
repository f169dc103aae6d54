"""One-layer transformers that learn to compose group elements: modular addition (Nanda et al., 2023) and other groups
(Chughtai et al., 2023), trained on the whole table at once, with their answer key.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from headwater.bench.toys.algebra import Algebra, measure
from headwater.core.errors import MethodError, StoreError
from headwater.core.groups import Group, excluded, group, kernel_share, restricted, scored
from headwater.core.progress import note, track
from headwater.core.results import Provenance, load_result
from headwater.localize.catalog import fitted

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class AlgebraConfig:
    """group: `C43` (addition modulo 43), `D7`, `S4`. share: of the unordered pairs {a, b}, how many are trained on (a
    pair and its mirror are on one side, as one gives the other away where the group commutes). d_model, n_heads,
    head_dim, d_mlp: one layer without norms. lr, weight_decay: AdamW's, full batch. steps: at most; `after` more once
    all test pairs are right, in which what is not needed decays. every: steps between points of the curve.

    Small groups need much of their table: with a share of 0.6 and a decay of 1, C43 was memorized, and 1% of the rest
    known after 4400 steps; with the defaults all of it is known after a few hundred.
    """

    group: str = "C43"
    share: float = 0.85
    d_model: int = 64
    n_heads: int = 4
    head_dim: int = 16
    d_mlp: int = 256
    lr: float = 3e-3
    weight_decay: float = 2.0
    steps: int = 6000
    after: int = 500
    every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = min(self.d_model, self.n_heads, self.head_dim, self.d_mlp, self.steps, self.every)
        if sizes < 1 or not 0 < self.share <= 1 or self.lr <= 0 or self.weight_decay < 0 or self.after < 0:
            raise MethodError("a config of group composition does not fit", got=f"{self}", wanted="positive sizes")


@dataclass(eq=False, kw_only=True)
class AlgebraModel:
    """A transformer that composes elements of a group, and what is known of how.

    train: [a, b] bool, the pairs that it was trained on.
    """

    model: "Model"
    group: Group
    config: AlgebraConfig
    train: Tensor
    answer: Algebra

    @classmethod
    def of(
        cls,
        model: "Model",
        group: Group,
        config: AlgebraConfig,
        *,
        train: Tensor | None = None,
        key: Sequence[str] | None = None,
        curve: pl.DataFrame | None = None,
        seconds: float | None = None,
    ) -> "AlgebraModel":
        """Measure a model. `key`: its irreps, where they are known."""
        logits, neurons = table_of(model, group)
        ids = element_ids(model, group)
        answer = measure(
            group,
            logits,
            neurons=neurons,
            embedding=model.hf.embed_tokens.weight.detach()[ids],
            train=train,
            curve=curve,
            config=asdict(config),
            provenance=Provenance.collect(model, seed=config.seed, seconds=seconds),
            **({} if key is None else {"key": key}),
        )
        whole = torch.ones(group.order, group.order, dtype=torch.bool)
        return cls(model=model, group=group, config=config, train=whole if train is None else train, answer=answer)

    def behavior(self, n: int = 64, *, seed: int = 0) -> "Behavior":
        """Pairs "a b =" that differ in one element; test pairs of the model where it has enough of them."""
        from headwater.behavior.table import Behavior

        generator = torch.Generator().manual_seed(seed + 49_979_687)
        free = ~self.train
        pool = (free if int(free.sum()) >= 2 * n else torch.ones_like(free)).nonzero()
        rows: list[dict[str, Any]] = []
        for a, b in pool[torch.randperm(len(pool), generator=generator)[:n]].tolist():
            other = int(torch.randint(self.group.order - 1, (1,), generator=generator))
            first = bool(torch.randint(2, (1,), generator=generator))
            other += other >= (a if first else b)
            pair = (other, b) if first else (a, other)
            said, foil = (self.group.elements[int(self.group.product[x, y])] for x, y in ((a, b), pair))
            rows.append(
                {
                    "prompt": self._text(a, b),
                    "counterfactual": self._text(*pair),
                    "answers": [f" {said}"],
                    "foils": [f" {foil}"],
                    "template": "first" if first else "second",
                }
            )
        return Behavior.from_rows(
            rows, name=f"compose-{self.group.name}", about={"group": self.group.name, "seed": seed}
        )

    def _text(self, a: int, b: int) -> str:
        return f"{self.group.elements[a]} {self.group.elements[b]} ="

    def save(self, folder: str | Path) -> Path:
        """Write model, tokenizer and answer key: `headwater.load(folder)` reads the model, `toys.load` all of it."""
        from headwater.core.files import to_json, write_bytes
        from headwater.core.loading_hf import calm

        path = Path(folder)
        with calm():
            self.model.hf.save_pretrained(path)
            self.model.tokenizer.save_pretrained(path)
        self.answer.save(path / "answer")
        self.behavior(min(200, self.group.order**2 // 2)).save(path / "behavior.parquet")
        head = {"config": asdict(self.config), "train": self.train.nonzero().tolist()}
        write_bytes(path / "toy.json", to_json(head).encode())
        return path


def load(folder: str | Path) -> AlgebraModel:
    """What `AlgebraModel.save` wrote. Raises StoreError for any other folder."""
    from headwater.core.files import read_json
    from headwater.core.loading import load as load_model

    path = Path(folder)
    head: Mapping[str, Any] = read_json(path / "toy.json", what="toy.json of a toy model")
    config = fitted(AlgebraConfig, head.get("config") or {})
    made, answer = group(config.group), load_result(path / "answer")
    if not isinstance(answer, Algebra):
        raise StoreError(f"{folder} holds no answer key", got=answer.kind)
    train = torch.zeros(made.order, made.order, dtype=torch.bool)
    for a, b in head.get("train") or ():
        train[a, b] = True
    return AlgebraModel(model=load_model(path), group=made, config=config, train=train, answer=answer)


def make_model(config: AlgebraConfig, made: Group, *, name: str) -> "Model":
    """A random one-layer transformer without norms, over the group's elements and "="."""
    from headwater.bench.plain import PlainConfig, PlainForCausalLM
    from headwater.bench.rasp.words import make_tokenizer
    from headwater.core.model import Model

    tokenizer = make_tokenizer([*made.elements, "="])
    plain = PlainConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=1,
        num_attention_heads=config.n_heads,
        head_dim=config.head_dim,
        max_position_embeddings=8,
        is_causal=True,
        bos_token_id=tokenizer.bos_token_id,
    )
    hf = PlainForCausalLM(plain)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for label, weight in hf.named_parameters():
            if weight.ndim == 1:
                weight.zero_()
                continue
            # a weight's scale is that of its input; scores are not divided in this architecture, so queries are here
            width = config.d_model if "embed" in label else weight.shape[1]
            weight.copy_(torch.randn(weight.shape, generator=generator) / width**0.5)
            if "q_proj" in label:
                weight /= config.head_dim**0.5
    return Model(hf.eval(), tokenizer, name=name)


def element_ids(model: "Model", made: Group) -> Tensor:
    """[order] token ids of the elements."""
    known = model.tokenizer.get_vocab()
    return torch.tensor([known[word] for word in made.elements])


def prompts(model: "Model", made: Group) -> Tensor:
    """[order * order, 4]: the first token, a, b and "=" for every pair, a slowest."""
    ids = element_ids(model, made)
    n = made.order
    a, b = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    known = model.tokenizer.get_vocab()
    first = torch.full((n * n,), int(model.tokenizer.bos_token_id))
    return torch.stack([first, ids[a], ids[b], torch.full((n * n,), known["="])], dim=1)


@torch.no_grad()
def table_of(model: "Model", made: Group) -> tuple[Tensor, Tensor]:
    """(logits [a, b, c], neurons [a, b, M]) at "=" for every pair."""
    n, ids = made.order, element_ids(model, made)
    kept: list[Tensor] = []
    handle = model.hf.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: kept.append(args[0][:, -1]))
    try:
        every = prompts(model, made)
        parts = [model.hf(input_ids=every[start : start + 2048]).logits[:, -1] for start in range(0, n * n, 2048)]
        logits = torch.cat(parts)[:, ids]
    finally:
        handle.remove()
    return logits.view(n, n, n), torch.cat(kept).view(n, n, -1)


def modular_addition(p: int = 43, *, out: str | Path | None = None, **options: Any) -> AlgebraModel:
    """Train addition modulo p until it generalizes; `options` are fields of AlgebraConfig. See `group_composition`."""
    return group_composition(f"C{p}", out=out, **options)


def group_composition(name: str = "S4", *, out: str | Path | None = None, **options: Any) -> AlgebraModel:
    """Train a one-layer transformer on part of a group's table until it knows the rest, and measure how.

    Known failure: whether it generalizes within the steps depends on seed, share and weight decay; `answer.facts
    ["passed"]` says whether it did and whether the key irreps carry the answer. Below generalization the measures still
    mean something: memorized logits lie along no irrep.
    """
    config = fitted(AlgebraConfig, {"group": name, **options})
    made = group(config.group)
    model = make_model(config, made, name=f"compose-{made.name}")
    train = split_pairs(made, config.share, config.seed)
    started = time.monotonic()
    curve = _fit(model, made, train, config)
    seconds = time.monotonic() - started
    found = AlgebraModel.of(model, made, config, train=train, curve=curve, seconds=seconds)
    if out is not None:
        found.save(out)
    return found


def split_pairs(made: Group, share: float, seed: int) -> Tensor:
    """[a, b] bool: the pairs to train on; a pair and its mirror are on the same side."""
    n = made.order
    a, b = torch.triu_indices(n, n)
    generator = torch.Generator().manual_seed(seed + 611_953)
    chosen = torch.randperm(len(a), generator=generator)[: max(1, round(share * len(a)))]
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[a[chosen], b[chosen]] = True
    mask[b[chosen], a[chosen]] = True
    return mask


def _fit(model: "Model", made: Group, train: Tensor, config: AlgebraConfig) -> pl.DataFrame:
    every, right = prompts(model, made), made.product.flatten()
    ids = element_ids(model, made)
    mine = train.flatten()
    inputs, labels = every[mine], ids[right[mine]]
    weights = list(model.hf.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    adam = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98), foreach=True)
    rows: list[dict[str, float]] = []
    done_at: int | None = None
    for step in track(range(1, config.steps + 1), f"compose {made.name}"):
        for part in adam.param_groups:
            part["lr"] = config.lr * min(1.0, step / 10)
        # in double: below 1e-7 a loss in single precision is noise, and a memorizing network then never generalizes
        logits = model.hf(input_ids=inputs).logits[:, -1].double()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % config.every == 0 or step == config.steps:
            rows.append(_point(model, made, train, step))
            note("  " + ", ".join(f"{key} {value:.3g}" for key, value in rows[-1].items()))
            if rows[-1]["test_accuracy"] >= 0.999 and done_at is None:
                done_at = step
        if done_at is not None and step >= done_at + config.after:
            break
    for weight in weights:
        weight.requires_grad_(False)
    return pl.DataFrame(rows)


def _point(model: "Model", made: Group, train: Tensor, step: int) -> dict[str, float]:
    logits = table_of(model, made)[0].double()
    logits = logits - logits.mean(dim=-1, keepdim=True)
    key = [one for one in made.irreps if one.name != "trivial" and kernel_share(made, one, logits) > 0.05]
    test = ~train if bool((~train).any()) else train
    on_train, on_test = scored(made, logits, train), scored(made, logits, test)
    return {
        "step": step,
        "train_loss": on_train["loss"],
        "test_loss": on_test["loss"],
        "train_accuracy": on_train["accuracy"],
        "test_accuracy": on_test["accuracy"],
        "restricted": scored(made, restricted(made, key, logits), torch.ones_like(train))["loss"],
        "excluded": scored(made, excluded(made, key, logits), train)["loss"],
    }
