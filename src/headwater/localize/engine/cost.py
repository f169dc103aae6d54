"""What work on a model costs: its arithmetic and memory measured on a probe, what is free, and what really ran.

Shapes: N = rows x positions run, S key positions, D width, V vocabulary. FLOPs count a multiply and an add as two.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from headwater.localize.engine.hooks import on_output, replace_forward

if TYPE_CHECKING:
    from headwater.core.model import Model

_LEAST = 96 * 2**20
_SHARE_OF_WEIGHTS = 0.4
_SHARE_OF_FREE = 0.5
_PROBE = 16


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A model's cost by parts, found on its own modules: FLOPs a position, except `mixing` (a query x key pair).

    attention, mlp: one layer's matrix products (of a mixture of experts only what a token goes through). vocabulary:
    the whole unembedding. scratch: bytes of activations alive at once in a forward that keeps nothing, a position.
    """

    n_layers: int
    attention: float
    mixing: float
    mlp: float
    vocabulary: float
    d_vocab: int
    scratch: float
    itemsize: int
    weights: int

    def forward(
        self,
        positions: float,
        *,
        keys: float = 0.0,
        attention: float | None = None,
        mlp: float | None = None,
        unembedded: float = 0.0,
        words: int | None = None,
    ) -> float:
        """FLOPs of one forward.

        positions: rows x positions. keys: how many keys each attends to. attention, mlp: positions x layers really run
        (None: all). unembedded: positions whose logits are computed, over `words` tokens of the vocabulary (None: all).
        """
        attended = positions * self.n_layers if attention is None else attention
        fed = positions * self.n_layers if mlp is None else mlp
        share = 1.0 if words is None else words / self.d_vocab
        return attended * (self.attention + self.mixing * keys) + fed * self.mlp + unembedded * self.vocabulary * share


_known: "WeakKeyDictionary[nn.Module, Costs]" = WeakKeyDictionary()


def costs_of(model: "Model") -> Costs:
    """The costs of a model; measured once, by two probe passes of 8 and 16 random tokens."""
    if model.hf not in _known:
        _known[model.hf] = _measure(model)
    return _known[model.hf]


def _measure(model: "Model") -> Costs:
    hf, anatomy = model.hf, model.anatomy
    blocks = [block for block in anatomy.main.blocks if block.attention is not None]
    counted: dict[int, tuple[float, float]] = {}
    for steps in (_PROBE // 2, _PROBE):
        with torch.no_grad():
            size = min(model.d_vocab, 1000)
            ids = torch.randint(min(3, size - 1), size, (1, steps), generator=torch.Generator().manual_seed(0))
            ids = ids.to(model.device)
            with FlopCounterMode(display=False) as flops:
                hf(input_ids=ids, use_cache=False)
            counted[steps] = float(flops.get_total_flops()), _peak(hf, ids)
    (few, few_bytes), (many, many_bytes) = counted[_PROBE // 2], counted[_PROBE]
    half = _PROBE // 2
    # matrix products grow with positions, attention with their square, and some kernels of attention are not counted
    squared = (many - 2 * few) / (_PROBE**2 - 2 * half**2)
    linear = (few - squared * half**2) / half
    own = [_matrices(block.attention.module) for block in blocks if block.attention is not None]
    attention = 2.0 * sum(own) / max(1, len(own))
    vocabulary = 2.0 * model.d_model * model.d_vocab
    mixing = sum(2.0 * b.attention.n_heads * (b.attention.d_head + b.attention.d_value) for b in blocks if b.attention)
    return Costs(
        n_layers=len(anatomy.main.blocks),
        attention=attention,
        mixing=mixing / max(1, len(blocks)),
        mlp=max(0.0, linear - vocabulary - attention * len(own)) / len(anatomy.main.blocks),
        vocabulary=vocabulary,
        d_vocab=model.d_vocab,
        scratch=(many_bytes - few_bytes) / half,
        itemsize=torch.empty(0, dtype=model.dtype).element_size(),
        weights=sum(p.numel() * p.element_size() for p in hf.parameters()),
    )


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


# --- memory


class _Alive(TorchDispatchMode):
    """Bytes of the storages made inside that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                weak = StorageWeakRef(one.untyped_storage())
                self.held[weak.cdata] = weak, one.untyped_storage().nbytes()
        self.held = {at: (weak, size) for at, (weak, size) in self.held.items() if not weak.expired()}
        self.most = max(self.most, sum(size for _, size in self.held.values()))
        return out


def _peak(hf: nn.Module, ids: Tensor) -> float:
    """Bytes alive at once, at most, in the blocks of a forward."""
    with ExitStack() as stack:
        head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None  # type: ignore[operator]
        if isinstance(head, nn.Module):
            replace_forward(stack, head, lambda x: x[..., :1])
        with _Alive() as alive:
            hf(input_ids=ids, use_cache=False)
    return float(alive.most)


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that the device has free now: of a GPU as CUDA says, of the host as the kernel does; None where neither is
    known.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated()
    found = [free for free in (_host_free(), _group_free()) if free is not None]
    return min(found, default=None)


def _host_free() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import os

        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _group_free() -> int | None:
    """What a container's limit leaves."""
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if most == "max" else int(most) - used + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def memory_budget(model: "Model", memory_mb: float | None = None) -> float:
    """Bytes that a method's batches may take beside the weights: `memory_mb` where it is given.

    Else .4 of what the weights take, at least 96 MB (with the weights, twice the bare model's peak is not reached), but
    never more than half of what the device has free.
    """
    if memory_mb is not None:
        return memory_mb * 2**20
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    free = free_bytes(model.device)
    wanted = max(_LEAST, _SHARE_OF_WEIGHTS * weights)
    return wanted if free is None else min(wanted, _SHARE_OF_FREE * free)


# --- what really ran


@dataclass(eq=False)
class Ran:
    """passes: forwards of the model. positions: rows x positions given to them. attention, mlp: positions x layers in
    which the block's attention, its MLP were really computed (not repeated from a run before).
    """

    passes: int = 0
    positions: int = 0
    attention: int = 0
    mlp: int = 0
    _own: dict[nn.Module, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "positions": self.positions, "attention": self.attention, "mlp": self.mlp}


@contextmanager
def counted(model: "Model") -> Iterator[Ran]:
    """Count what runs of the model inside, by hooks on its blocks' attention and MLP. Probes count too."""
    ran = Ran()

    def replaced(module: nn.Module) -> bool:
        return module.__dict__.get("forward") is not ran._own[module]  # pyright: ignore[reportPrivateUsage]

    def model_called(_: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ran.passes += 1
        ran.positions += ids.numel() if isinstance(ids, Tensor) else 0

    def attended(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None and not replaced(module):
            ran.attention += x.numel() // x.shape[-1]

    def fed(module: nn.Module, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if not replaced(module):
            ran.mlp += y.numel() // y.shape[-1]

    with ExitStack() as stack:
        stack.callback(model.hf.register_forward_pre_hook(model_called, with_kwargs=True).remove)
        for block in model.anatomy.main.blocks:
            if block.attention is not None:
                module = block.attention.module
                ran._own[module] = module.__dict__.get("forward")  # pyright: ignore[reportPrivateUsage]
                stack.callback(module.register_forward_pre_hook(attended, with_kwargs=True).remove)
            if block.mlp is not None:
                module = block.mlp.entry.module
                ran._own[module] = module.__dict__.get("forward")  # pyright: ignore[reportPrivateUsage]
                on_output(stack, module, lambda y, module=module: fed(module, y))
        yield ran
