"""The gradient of every sequence's own loss, as rows: what all attribution by gradients starts from."""

import contextlib
import fnmatch
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean

Of = Literal["loss", "margin"]


class SequenceGradients:
    """Gradients of the sequences' losses with respect to some weights of a model, one row a sequence.

    weights: patterns of parameter names (`model.layers.*`); empty means all. A loss is the mean cross entropy, in nats,
    over the predicted tokens (0 where there is none); "margin" is minus the mean of log(p / (1 - p)) over them (Park et
    al., 2023). Gradients are float32 at least.
    vectorized: all sequences of a batch in one pass (torch.func.vmap); else one after the other, for models that vmap
    cannot run.
    """

    def __init__(self, hf: Any, weights: Sequence[str] = (), *, vectorized: bool = True) -> None:
        self.hf, self._vectorized = hf, vectorized
        every = dict(hf.named_parameters())
        chosen = [n for n in every if not weights or any(fnmatch.fnmatchcase(n, pattern) for pattern in weights)]
        if not chosen:
            wanted = did_you_mean(str(weights[0]), list(every))
            raise MethodError("no weight has such a name", got=", ".join(weights), wanted=wanted)
        self.names = chosen
        self.weights = {name: every[name].detach() for name in chosen}
        self._others = {name: one.detach() for name, one in every.items() if name not in self.weights}
        self.n_weights = sum(one.numel() for one in self.weights.values())

    def rows(self, ids: Tensor, at: Tensor, of: Of = "loss") -> Tensor:
        """[n, weights]: of ids [n, T], where at [n, T] says which tokens are predicted (the first never is)."""
        return torch.cat([part.flatten(1) for part in self.parts(ids, at, of).values()], dim=1)

    def parts(self, ids: Tensor, at: Tensor, of: Of = "loss", *, targets: Tensor | None = None) -> dict[str, Tensor]:
        """The same, weight by weight: [n, *shape]. targets: [n, T - 1], predicted in place of the next tokens."""
        measure = _margin if of == "margin" else _loss
        wanted = ids[:, 1:] if targets is None else targets

        def one(weights: dict[str, Tensor], row: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
            return measure(self._logits(weights, row[None, :-1])[0], wanted, mask[1:])

        with _plain_attention(), self.still():
            if self._vectorized:
                try:
                    every = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0, 0))(
                        self.weights, ids, at, wanted
                    )
                    return {name: _single(grads) for name, grads in every.items()}
                except RuntimeError as error:
                    raise MethodError(
                        "the gradients of this model's sequences cannot be had all at once",
                        got=str(error).splitlines()[0], fix="Set vectorized=False (slower)",
                    ) from error  # fmt: skip
            each = [torch.func.grad(one)(self.weights, *row) for row in zip(ids, at, wanted, strict=True)]
        return {name: _single(torch.stack([grads[name] for grads in each])) for name in self.names}

    def losses(self, ids: Tensor, at: Tensor) -> Tensor:
        """[n] mean cross entropy over the predicted tokens of each sequence."""
        return self._each(_loss, ids, at)

    def chances(self, ids: Tensor, at: Tensor) -> Tensor:
        """[n] mean probability of the predicted tokens of each sequence."""
        return self._each(_chance, ids, at)

    def _each(self, measure: Callable[[Tensor, Tensor, Tensor], Tensor], ids: Tensor, at: Tensor) -> Tensor:
        with torch.no_grad(), self.still():
            logits = self.hf(input_ids=ids[:, :-1], use_cache=False).logits
            return torch.stack([measure(*row) for row in zip(logits, ids[:, 1:], at[:, 1:], strict=True)])

    def _logits(self, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        every = self._others | weights
        return torch.func.functional_call(self.hf, every, (), {"input_ids": ids, "use_cache": False}).logits

    @contextlib.contextmanager
    def still(self) -> Generator[None]:
        """Without dropout, and left as it was."""
        training = self.hf.training
        self.hf.eval()
        try:
            yield
        finally:
            self.hf.train(training)


@contextlib.contextmanager
def _plain_attention() -> Generator[None]:
    """The attention that has a rule for vmap."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.MATH]):
        yield


def _single(values: Tensor) -> Tensor:
    """Of single precision at least: what is summed, solved and sorted needs it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean(values: Tensor, at: Tensor) -> Tensor:
    """0 where nothing is predicted."""
    return (values * at).sum() / at.sum().clamp(min=1)


def _loss(logits: Tensor, targets: Tensor, at: Tensor) -> Tensor:
    return _mean(torch.nn.functional.cross_entropy(logits, targets, reduction="none"), at)


def _margin(logits: Tensor, targets: Tensor, at: Tensor) -> Tensor:
    own = logits.gather(-1, targets[:, None])[:, 0]
    others = logits.scatter(-1, targets[:, None], float("-inf")).logsumexp(-1)
    return _mean(others - own, at)


def _chance(logits: Tensor, targets: Tensor, at: Tensor) -> Tensor:
    return _mean(logits.softmax(-1).gather(-1, targets[:, None])[:, 0], at)


class Sketch:
    """A random projection to `size` numbers that keeps inner products in the mean: each weight is added to one of them
    with a random sign (count sketch; Charikar et al., 2002). size None: nothing is projected."""

    def __init__(self, n: int, size: int | None, *, seed: int, device: Any = "cpu") -> None:
        self._size = None if size is None or size >= n else size
        if self._size is not None:
            draw = torch.Generator().manual_seed(seed)
            self._place = torch.randint(self._size, (n,), generator=draw).to(device)
            self._sign = (torch.randint(2, (n,), generator=draw) * 2 - 1).to(device)

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, weights] to [n, size]."""
        if self._size is None:
            return rows
        out = rows.new_zeros(len(rows), self._size)
        return out.index_add_(1, self._place, rows * self._sign.to(rows.dtype))
