"""Seeing and replacing what passes a module, for as long as a `with` block lasts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.anatomy import Port

Seen = Callable[[Tensor], Tensor | None]
"""Gets the tensor at a port; what it returns, if anything, takes its place."""


def on_port(stack: ExitStack, port: Port, act: Seen) -> None:
    """Call `act` on the tensor that passes `port` until `stack` closes."""
    if port.side == "in":
        stack.callback(on_input(port.module, act, port.key).remove)
        return

    def leave(_: nn.Module, args: Any, output: Any) -> Any:
        if port.key is None:
            return act(output)
        new = act(output[port.key])
        if new is None:
            return None
        items = list(output)
        items[port.key] = new  # type: ignore[index]
        return type(output)(items) if type(output) in (tuple, list) else type(output)(*items)

    stack.callback(port.module.register_forward_hook(leave).remove)


def on_input(module: nn.Module, act: Seen, key: int | str | None = 0) -> Any:
    """Call `act` on one argument of a module; gives the hook's handle."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(key, str):
            new = act(kwargs[key])
            return None if new is None else (args, {**kwargs, key: new})
        at = key or 0
        new = act(args[at])
        return None if new is None else ((*args[:at], new, *args[at + 1 :]), kwargs)

    return module.register_forward_pre_hook(enter, with_kwargs=True)


def on_output(stack: ExitStack, module: nn.Module, act: Callable[[Any], Any]) -> None:
    """Call `act` on the whole output of a module until `stack` closes."""
    stack.callback(module.register_forward_hook(lambda _, args, output: act(output)).remove)


def replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Run `forward` in place of the module's own arithmetic until `stack` closes: what it would compute is not
    computed.
    """
    before = module.__dict__.get("forward")

    def restore() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    stack.callback(restore)
    module.__dict__["forward"] = forward


def hand_on(given: Any, key: int | str | None, stream: Tensor | None, into: int | str | None) -> Callable[..., Any]:
    """A block that is not run: it gives back what enters it (argument `into`), or `stream`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = stream
        if x is None:
            x = kwargs[into] if isinstance(into, str) and into in kwargs else args[into if isinstance(into, int) else 0]
        if key is None:
            return x
        items = list(given)
        items[key] = x  # type: ignore[index]
        return type(given)(items)

    return forward


@contextmanager
def frozen(hf: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient of any weight inside; everything as it was afterwards."""
    modes = [(module, module.training) for module in hf.modules() if module.training]
    asked = [weight for weight in hf.parameters() if weight.requires_grad]
    try:
        for module, _ in modes:
            module.training = False
        for weight in asked:
            weight.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for module, was in modes:
            module.training = was
        for weight in asked:
            weight.requires_grad_(True)
