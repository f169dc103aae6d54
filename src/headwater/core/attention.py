"""One way into every attention: the function that transformers calls, seen and edited.

transformers' models hand q, k and v, split by head, to a function that is looked up by the name of the attention
implementation. While a session is open, that name leads to `_dispatch`, which knows its own modules and hands every
other call through. The config of the user's model is never touched, so no branch in the model's code changes, and masks
are made as they always are.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from headwater.core.errors import SiteError

Handler = Callable[..., tuple[torch.Tensor, Any]]
"""handler(original, module, q, k, v, mask, **kwargs) -> (out, weights): in and out as the attention function itself."""

_lock = threading.RLock()
_handlers: dict[int, list[Handler]] = {}
_originals: dict[str, Callable[..., Any] | None] = {}
_open = 0


def eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """The plain attention function of the file that defines this module, where there is one."""
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    return None


def _dispatcher(name: str) -> Callable[..., Any]:
    def dispatch(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        original = _originals.get(name) or eager_of(module)
        if original is None:
            raise SiteError(
                f"{type(module).__name__} names the attention {name!r}, but its file defines no such function"
            )
        handlers = _handlers.get(id(module))
        if not handlers:
            return original(module, query, key, value, *args, **kwargs)
        return handlers[-1](original, module, query, key, value, *args, **kwargs)

    return dispatch


@contextmanager
def attention_session(handlers: dict[nn.Module, Handler], names: set[str]) -> Generator[None]:
    """Send the attention calls of these modules through their handlers; everything is put back on the way out.

    names: the attention implementations that the modules' configs name ("sdpa", "eager", ...).
    """
    global _open
    from transformers.modeling_utils import AttentionInterface

    # Its instances delete only from a mapping of their own, so there is no public way to take a name out again.
    mapping = AttentionInterface._global_mapping  # pyright: ignore[reportPrivateUsage]
    with _lock:
        _open += 1
        for name in names:
            if name not in _originals:
                _originals[name] = mapping.get(name)
                AttentionInterface.register(name, _dispatcher(name))
        for module, handler in handlers.items():
            _handlers.setdefault(id(module), []).append(handler)
    try:
        yield
    finally:
        with _lock:
            for module in handlers:
                _handlers[id(module)].pop()
                if not _handlers[id(module)]:
                    del _handlers[id(module)]
            _open -= 1
            if _open == 0:
                for name, original in _originals.items():
                    if original is None:
                        mapping.pop(name, None)
                    else:
                        AttentionInterface.register(name, original)
                _originals.clear()


@contextmanager
def method_session(handlers: dict[nn.Module, Handler], methods: dict[nn.Module, str]) -> Generator[None]:
    """The same for modules that compute attention in a method of their own (GPT-J): the method is shadowed on the
    instance."""
    shadowed: list[tuple[nn.Module, str]] = []
    try:
        for module, handler in handlers.items():
            name = methods[module]
            own = getattr(module, name)

            def original(
                _module: nn.Module, q: Any, k: Any, v: Any, mask: Any = None, *, own: Any = own, **kwargs: Any
            ) -> Any:
                out, weights = own(q, k, v, mask, **kwargs)
                return out.transpose(1, 2), weights

            def shadow(
                q: Any,
                k: Any,
                v: Any,
                attention_mask: Any = None,
                *,
                module: nn.Module = module,
                handler: Handler = handler,
                original: Any = original,
                **kwargs: Any,
            ) -> Any:
                out, weights = handler(original, module, q, k, v, attention_mask, **kwargs)
                return out.transpose(1, 2), weights

            module.__dict__[name] = shadow
            shadowed.append((module, name))
        yield
    finally:
        for module, name in shadowed:
            module.__dict__.pop(name, None)


class _AtSoftmax(TorchFunctionMode):
    """Sees (and may change) what goes into the softmax of an attention function."""

    def __init__(self, n_keys: int, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.n_keys, self.edit, self.seen = n_keys, edit, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax) and not self.seen:
            self.seen = True
            scores = args[0]
            # An attention sink is one column more than there are keys; it is not a score of any key.
            edited = self.edit(scores[..., : self.n_keys])
            if scores.shape[-1] > self.n_keys:
                edited = torch.cat([edited, scores[..., self.n_keys :]], dim=-1)
            args = (edited, *args[1:])
        return func(*args, **kwargs)


def attend_plainly(
    plain: Callable[..., Any],
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    edit_scores: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its weights kept: (out [B, T, H, K], pattern [B, H, T, S]), by the model's own plain function.

    A mask made for another implementation (boolean, or left out because the kernel knows it is causal) is first made
    additive.
    """
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    mask = additive_mask(mask, q, k, causal=bool(causal))
    if edit_scores is None:
        out, pattern = plain(module, q, k, v, mask, **kwargs)
    else:
        with _AtSoftmax(k.shape[-2], edit_scores) as mode:
            out, pattern = plain(module, q, k, v, mask, **kwargs)
        if not mode.seen:
            raise SiteError(
                f"the attention of {type(module).__name__} calls no softmax",
                fix="scores cannot be read here; pattern can",
            )
    if pattern is None:
        raise SiteError(
            f"the attention of {type(module).__name__} returns no weights", fix="Sites pattern and scores are not there"
        )
    return out, pattern


def additive_mask(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, *, causal: bool) -> torch.Tensor | None:
    """The mask as a number to add to the scores, [B or 1, 1, T, S]; None where every query sees every key."""
    lowest = torch.finfo(q.dtype).min
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if mask is None:
        if not causal or n_queries == 1:
            return None
        # Queries are the last positions of the keys when there is a cache.
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
        mask = seen[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, lowest)
    return mask


def mix_values(pattern_BHTS: torch.Tensor, v_BGSK: torch.Tensor) -> torch.Tensor:
    """What attention with these weights gives: [B, T, H, K], key/value heads shared by groups of query heads."""
    repeats = pattern_BHTS.shape[1] // v_BGSK.shape[1]
    if repeats > 1:
        v_BGSK = v_BGSK.repeat_interleave(repeats, dim=1)
    return torch.matmul(pattern_BHTS, v_BGSK).transpose(1, 2)
