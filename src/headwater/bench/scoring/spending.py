"""What a method's run costs, seen from outside: for methods that do not count their own passes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from headwater.localize.engine.cost import counted
from headwater.localize.engine.hooks import on_output

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass
class Spent:
    """forward: positions run through attention, over those of one pass of every prompt. backward: rows that gradients
    came back for, over those of one pass (a row counts whole where only its last position is differentiated). n: the
    pairs.
    """

    forward: float = 0.0
    backward: float = 0.0
    n: int = 0


@contextmanager
def spent(model: "Model", behavior: "Behavior") -> Iterator[Spent]:
    """Count, by hooks on the blocks' attention, what is run forward and for what gradients come back."""
    bound = behavior.bind(model)
    found = Spent(n=bound.n)
    layers = max(1, len(model.anatomy.main.blocks))
    once = sum(len(group) * group.length for group in bound.groups) * layers
    back = 0

    def came_back(gradient: Tensor) -> None:
        nonlocal back
        back += len(gradient)

    def watch(out: object) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(came_back)

    with ExitStack() as stack:
        for block in model.anatomy.main.blocks:
            if block.attention is not None:
                on_output(stack, block.attention.module, watch)
        ran = stack.enter_context(counted(model))
        yield found
    found.forward, found.backward = ran.attention / max(1, once), back / max(1, bound.n * layers)
