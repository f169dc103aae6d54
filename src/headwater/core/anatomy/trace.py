"""One traced forward: which module was called when, with which tensors. What the finder reads."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from headwater.core.anatomy.declared import ATTENTION_METHODS
from headwater.core.attention import attention_session, method_session


@dataclass(eq=False)
class Call:
    """One call of a module. `enter` and `exit` count events, so that nesting and order can be compared."""

    name: str
    module: nn.Module
    enter: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    exit: int = -1
    output: Any = None

    def inputs(self) -> list[tuple[int | str, torch.Tensor]]:
        """Floating-point tensors among the arguments, by position or name."""
        named = [*enumerate(self.args), *self.kwargs.items()]
        return [(key, value) for key, value in named if isinstance(value, torch.Tensor) and value.is_floating_point()]

    def outputs(self) -> list[tuple[int | None, torch.Tensor]]:
        if isinstance(self.output, torch.Tensor):
            return [(None, self.output)]
        if isinstance(self.output, tuple | list):
            return [(i, x) for i, x in enumerate(self.output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return []


@dataclass(eq=False)
class AttentionCall:
    """One call of an attention function: q [B, H, T, K], k and v [B, G, S, K], out [B, T, H, K]."""

    module: nn.Module
    at: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor


@dataclass(eq=False)
class Trace:
    calls: list[Call] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    output: Any = None

    def within(self, call: Call) -> list[Call]:
        """Calls made inside another, in the order they were entered."""
        return [c for c in self.calls if call.enter < c.enter and c.exit < call.exit]


def attention_names(hf: nn.Module) -> set[str]:
    """The attention implementations that the configs in this model name."""
    names = {getattr(getattr(m, "config", None), "_attn_implementation", None) for m in hf.modules()}
    return {name for name in names if isinstance(name, str)}


@contextmanager
def evaluating(hf: nn.Module) -> Generator[None]:
    """Dropout is off inside; each module's own mode comes back after."""
    training = [module for module in hf.modules() if module.training] if hf.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def trace(hf: nn.Module, inputs: dict[str, Any]) -> Trace:
    """Run the model once on `inputs`, recording every module call and every attention call."""
    found = Trace()
    clock = 0
    open_calls: list[Call] = []

    def tick() -> int:
        nonlocal clock
        clock += 1
        return clock

    def handler(original: Any, module: nn.Module, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(module, q, k, v, *args, **kwargs)
        found.attention.append(AttentionCall(module, tick(), q, k, v, out))
        return out, weights

    names = {module: name for name, module in hf.named_modules()}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(names[module], module, tick(), args, kwargs)
        found.calls.append(call)
        open_calls.append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = open_calls.pop()
        call.exit, call.output = tick(), output

    methods = {m: ATTENTION_METHODS[type(m).__name__] for m in hf.modules() if type(m).__name__ in ATTENTION_METHODS}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        handlers = {module: handler for module in hf.modules() if module not in methods}
        stack.enter_context(attention_session(handlers, attention_names(hf)))
        stack.enter_context(method_session(dict.fromkeys(methods, handler), methods))
        for module in hf.modules():
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        found.output = hf(**inputs)
    return found


def device_of(hf: Any) -> torch.device:
    """Where inputs go: the first weight's device, or, where accelerate holds weights elsewhere, the one it computes
    on."""
    device = next((p.device for p in hf.parameters() if p.device.type != "meta"), None)
    for module in hf.modules() if device is None else ():
        told = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if told is not None:
            return torch.device(told)
    return torch.device("cpu") if device is None else device


def probe_inputs(hf: Any, length: int = 5) -> dict[str, Any]:
    """A tiny input that any model of the library takes: seeded token ids, speech features or pixels."""
    config = hf.config
    device = device_of(hf)
    dtype = next(p.dtype for p in hf.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    length = min(length, getattr(text, "max_position_embeddings", None) or length)  # a context of four is trained here

    def tokens() -> torch.Tensor:
        size = min(getattr(text, "vocab_size", 2), 1000)
        return torch.randint(min(3, size - 1), size, (1, length), generator=generator).to(device)

    def pixels() -> torch.Tensor:
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, getattr(vision, "num_channels", 3), height, width)
        return torch.randn(shape, generator=generator).to(device, dtype)

    main = getattr(hf, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    if main == "input_features":
        frames = 2 * config.max_source_positions
        inputs[main] = torch.randn(1, config.num_mel_bins, frames, generator=generator).to(device, dtype)
    elif main == "pixel_values":
        inputs[main] = pixels()
    else:
        inputs["input_ids"] = tokens()
        if hasattr(config, "vision_config") and hasattr(config, "text_config") and hasattr(config, "projection_dim"):
            inputs["pixel_values"] = pixels()
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens()
    return inputs
