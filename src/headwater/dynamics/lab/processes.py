"""The processes that train together: one, or those that torch's launcher (`torchrun`) started."""

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from headwater.core.errors import MethodError


class Processes:
    """Which of how many this process is. With one, nothing here does anything."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def mine(self, n: int) -> slice:
        """This process' part of n rows. Raises MethodError where they cannot be shared evenly."""
        if n % self.world:
            raise MethodError(
                f"a batch of {n} cannot be shared evenly", got=f"{self.world} processes", fix="Take a multiple of them"
            )
        size = n // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put into each tensor its sum over the processes, by one message for all of them."""
        if self.world == 1:
            return
        held = list(tensors)
        flat = torch.cat([one.reshape(-1) for one in held])
        torch.distributed.all_reduce(flat)
        for one, part in zip(held, flat.split([one.numel() for one in held]), strict=True):
            one.copy_(part.view_as(one))

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.world > 1:
            torch.distributed.barrier()


@contextmanager
def processes(device: torch.device) -> Generator[Processes]:
    """Join the processes that the launcher's environment variables tell of; leave them at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    own = not torch.distributed.is_initialized()
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        if own:
            torch.distributed.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device of a config: "auto" is CUDA where it is present, and with several processes each has its own."""
    from headwater.core.errors import ModelError

    here = os.environ.get("LOCAL_RANK", "0")
    if name == "auto":
        return torch.device(f"cuda:{here}") if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(f"cuda:{here}" if name == "cuda" else name)
    except RuntimeError:
        raise ModelError("unknown device", got=repr(name), wanted="auto, cpu, cuda, cuda:1, mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"no device {name} here", fix="Use cpu, or auto")
    return device
