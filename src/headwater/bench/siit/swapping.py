"""Running a transformer with what nodes write swapped for what they wrote in another run, differentiably.

For training: gradients flow into the weights, through the run and through the run that the values come from. Each row
of a batch swaps nodes of its own, so that one pass serves many interchanges.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.core.errors import ModelError
from headwater.localize.graph import Graph

if TYPE_CHECKING:
    from headwater.core.model import Model


class Writes:
    """What every head and MLP wrote: `z` [L] of [B, T, H, K], heads before the output projection, and `mlp` [L] of
    [B, T, D].
    """

    def __init__(self) -> None:
        self.z: list[Tensor] = []
        self.mlp: list[Tensor] = []

    def detached(self) -> "Writes":
        """The same values without their gradients."""
        found = Writes()
        found.z, found.mlp = [x.detach() for x in self.z], [x.detach() for x in self.mlp]
        return found


class Swapper:
    """A model whose nodes can be swapped. Columns of `rows` are `graph.sources[1:]`: each layer's heads, then its MLP.

    Raises ModelError where an output of a node is not a module's own output.
    """

    def __init__(self, model: "Model") -> None:
        self.model, self.hf = model, model.hf
        self.n_heads, self.n_layers = model.n_heads, model.n_layers
        self.graph = Graph(
            n_layers=model.n_layers, n_heads=model.n_heads, n_kv_heads=model.n_kv_heads, d_model=model.d_model
        )
        self.nodes = self.graph.sources[1:]
        self._index = {name: index for index, name in enumerate(self.nodes)}
        self._out: list[nn.Module] = []
        self._mlp: list[nn.Module] = []
        for block in model.anatomy.main.blocks:
            attention, mlp = block.attention, block.mlp
            if attention is None or mlp is None or "mlp_out" not in block.plain or attention.write.scale != 1.0:
                raise ModelError("this model's heads or MLPs cannot be swapped in training", got=block.name)
            self._out.append(attention.out_proj)
            self._mlp.append(block.plain["mlp_out"].module)

    def rows(self, n: int, nodes: "list[list[str]]") -> Tensor:
        """[n, nodes] bool from a list of nodes a row."""
        found = torch.zeros(n, len(self.nodes), dtype=torch.bool)
        for row, names in enumerate(nodes):
            for name in names:
                found[row, self._index[name]] = True
        return found

    def mask(self, names: "list[str] | tuple[str, ...]") -> Tensor:
        """[nodes] bool."""
        return self.rows(1, [list(names)])[0]

    def record(self, ids: Tensor) -> tuple[Tensor, Writes]:
        """(logits [B, T, V], what every node wrote)."""
        writes = Writes()

        def keep(z: Tensor, layer: int) -> Tensor:
            writes.z.append(z.unflatten(-1, (self.n_heads, -1)))
            return z

        def keep_mlp(out: Tensor, layer: int) -> Tensor:
            writes.mlp.append(out)
            return out

        with self._hooked(keep, keep_mlp):
            return self._logits(ids), writes

    def swapped(self, ids: Tensor, source: Writes, rows: Tensor) -> Tensor:
        """Logits [B, T, V] of `ids` where row b's nodes `rows[b]` write what they wrote in row b of `source`."""
        by_layer = rows.view(len(rows), self.n_layers, self.n_heads + 1)

        def put(z: Tensor, layer: int) -> Tensor:
            heads = by_layer[:, layer, : self.n_heads]
            if not bool(heads.any()):
                return z
            split = z.unflatten(-1, (self.n_heads, -1))
            return torch.where(heads[:, None, :, None], source.z[layer], split).flatten(-2)

        def put_mlp(out: Tensor, layer: int) -> Tensor:
            which = by_layer[:, layer, self.n_heads]
            return torch.where(which[:, None, None], source.mlp[layer], out) if bool(which.any()) else out

        with self._hooked(put, put_mlp):
            return self._logits(ids)

    def _logits(self, ids: Tensor) -> Tensor:
        return self.hf(input_ids=ids, use_cache=False).logits

    @contextmanager
    def _hooked(self, at_z: Callable[[Tensor, int], Tensor], at_mlp: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        def before_out(layer: int) -> Callable[..., Any]:
            return lambda module, args: (at_z(args[0], layer), *args[1:])

        def after_mlp(layer: int) -> Callable[..., Any]:
            return lambda module, args, value: at_mlp(value, layer)

        handles: list[Any] = []
        try:
            for layer, (out, mlp) in enumerate(zip(self._out, self._mlp, strict=True)):
                handles.append(out.register_forward_pre_hook(before_out(layer)))
                handles.append(mlp.register_forward_hook(after_mlp(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()
