"""How a model's nodes read and write its residual stream, measured on the modules that the user has.

From core's anatomy (which module is which) to what exact scoring needs: which rows of which projection make each head's
query, key and value; which form each norm has; how a head's write is scaled on its way into the stream. All of it is
checked once against autograd on a tiny input; a model for which it does not hold is refused by name.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.core.anatomy import Anatomy, Attention, Block, Mlp, is_norm, linear_weight
from headwater.core.attention import attention_session, method_session
from headwater.core.errors import ModelError
from headwater.localize.engine.hooks import frozen, on_input, on_output, on_port
from headwater.localize.engine.norms import Norm, measure_norm
from headwater.localize.graph import Graph

PartName = Literal["q", "k", "v"]
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}


@dataclass(frozen=True, eq=False)
class Part:
    """Queries, keys or values of a layer: `rows` [heads, width] of a linear module's output."""

    projection: nn.Module
    rows: Tensor

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[heads, width, D]."""
        return linear_weight(self.projection).detach()[self.rows].to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[heads, width]."""
        bias = getattr(self.projection, "bias", None)
        return None if bias is None else bias.detach()[self.rows].to(dtype)


@dataclass(frozen=True, eq=False)
class Layer:
    """One block: the modules at which its nodes read and write."""

    block: Block
    attention: Attention
    mlp: Mlp
    parts: dict[PartName, Part]
    norm: Norm
    mlp_norm: Norm
    post_norm: Norm

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The one to three linear modules that make queries, keys and values."""
        return tuple(dict.fromkeys(part.projection for part in self.parts.values()))


@dataclass(frozen=True, eq=False)
class Wiring:
    """Every layer of a model and its circuit graph."""

    graph: Graph
    layers: tuple[Layer, ...]
    final_norm: nn.Module | None
    unembed: nn.Module | None
    d_model: int


_known: "WeakKeyDictionary[nn.Module, Wiring]" = WeakKeyDictionary()


def wiring_of(model: Any) -> Wiring:
    """The wiring of a headwater Model; measured once a `transformers` module. Raises ModelError with what does not
    hold.
    """
    if model.hf not in _known:
        _known[model.hf] = measure(model.hf, model.anatomy)
    return _known[model.hf]


def graph_of(model: Any) -> Graph:
    """The circuit graph of a model. Raises ModelError for a model that has none."""
    return wiring_of(model).graph


def measure(hf: nn.Module, anatomy: Anatomy) -> Wiring:
    """Measure and check the wiring of `hf`."""
    blocks = anatomy.main.blocks
    name = type(hf).__name__
    _refuse_unfit(name, anatomy, blocks)
    width = anatomy.main.d_model
    with frozen(hf):
        layers = _measure_layers(hf, name, blocks, width)
        first = blocks[0].attention
        graph = Graph(
            n_layers=len(blocks),
            n_heads=first.n_heads,  # type: ignore[union-attr]
            n_kv_heads=first.n_kv_heads,  # type: ignore[union-attr]
            parallel=blocks[0].order == "parallel",
            d_model=width,
        )
        wiring = Wiring(graph, layers, anatomy.main.final_norm, anatomy.unembed, width)
        _check(hf, name, wiring)
    return wiring


def _refuse_unfit(name: str, anatomy: Anatomy, blocks: tuple[Block, ...]) -> None:
    def refuse(why: str) -> None:
        raise ModelError(
            f"{name} has no circuit graph of heads and MLPs: {why}",
            wanted="a decoder whose residual stream is the sum of what its heads and MLPs write",
            fix="Patch its sites with model.run and interventions instead",
        )

    for block in blocks:
        if block.order not in ("sequential", "parallel"):
            refuse(f"layer {block.index} is {block.order.replace('_', '-')}, so its stream is not that sum")
        if block.attention is None or block.mlp is None:
            refuse(f"layer {block.index} has no {'attention' if block.attention is None else 'MLP'}")
        if block.cross is not None:
            refuse(f"layer {block.index} reads another stack by cross-attention")
        if block.order != blocks[0].order:
            refuse(f"layer {block.index} is {block.order}, layer 0 is {blocks[0].order}")
        shape = [(b.attention.n_heads, b.attention.n_kv_heads) for b in (blocks[0], block) if b.attention]
        if shape[0] != shape[1]:
            refuse(f"layer {block.index} has {shape[1]} heads, layer 0 has {shape[0]}")
    if not anatomy.has_logits:
        refuse("it gives no logits")


# --- measuring


def _measure_layers(hf: nn.Module, name: str, blocks: tuple[Block, ...], width: int) -> tuple[Layer, ...]:
    seen: list[dict[str, Any]] = [{} for _ in blocks]
    outputs: dict[nn.Module, Any] = {}
    inputs: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        _catch_qkv(stack, blocks, seen)
        on_port(stack, blocks[0].input, lambda x: x.detach().requires_grad_(True))
        for block in blocks:
            for module in block.module.modules():
                if isinstance(getattr(module, "weight", None), Tensor) or is_norm(module):
                    on_output(stack, module, lambda y, module=module: outputs.__setitem__(module, y))
                    stack.callback(on_input(module, lambda x, module=module: inputs.__setitem__(module, x)).remove)
        with torch.enable_grad():
            _tiny_forward(hf)
        layers = []
        signatures: dict[Any, dict[PartName, tuple[str, Tensor]]] = {}
        for block, qkv in zip(blocks, seen, strict=True):
            attention, mlp = block.attention, block.mlp
            assert attention is not None
            assert mlp is not None
            names = {module: path for path, module in attention.module.named_modules()}
            linears = [m for m in names if _is_linear(m) and m is not attention.out_proj and m in outputs]
            signature = tuple((names[m], tuple(m.weight.shape)) for m in linears)  # type: ignore[union-attr]
            if signature not in signatures:
                signatures[signature] = {
                    part: _rows(name, block.index, part, qkv[part], linears, names, outputs, inputs)
                    for part in ("q", "k", "v")
                }
            by_name = {path: module for module, path in names.items()}
            parts: dict[PartName, Part] = {
                part: Part(by_name[path], rows) for part, (path, rows) in signatures[signature].items()
            }
            post = _post_norm(name, block.index, attention, outputs, inputs, width)
            norms = measure_norm(attention.norm, width), measure_norm(mlp.norm, width)
            layers.append(Layer(block, attention, mlp, parts, *norms, post))
    return tuple(layers)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _tiny_forward(hf: nn.Module) -> Any:
    device = next(hf.parameters()).device
    size = min(hf.config.get_text_config().vocab_size, 1000)  # type: ignore[union-attr]
    ids = torch.randint(min(3, size - 1), size, (2, 5), generator=torch.Generator().manual_seed(1)).to(device)
    return hf(input_ids=ids, use_cache=False)


def _catch_qkv(stack: ExitStack, blocks: tuple[Block, ...], seen: list[dict[str, Any]]) -> None:
    """Have the attention of each block leave its q, k, v [B, heads, T, K] in `seen`."""
    functions: dict[nn.Module, Any] = {}
    methods: dict[nn.Module, Any] = {}
    names: set[str] = set()
    for block, store in zip(blocks, seen, strict=True):
        attention = block.attention
        assert attention is not None

        def handler(
            original: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, _store: Any = store, **kw: Any
        ) -> Any:
            _store.update(q=q, k=k, v=v)
            return original(module, q, k, v, mask, **kw)

        if attention.method:
            methods[attention.module] = handler
        else:
            functions[attention.module] = handler
            names.add(str(attention.module.config._attn_implementation))  # type: ignore[union-attr]
    if functions:
        stack.enter_context(attention_session(functions, names))
    if methods:
        by_name = {b.attention.module: str(b.attention.method) for b in blocks if b.attention}
        stack.enter_context(method_session(methods, by_name))
    stack.enter_context(nullcontext())


def _rows(
    name: str,
    layer: int,
    part: PartName,
    states: Tensor,
    linears: list[nn.Module],
    names: dict[nn.Module, str],
    outputs: dict[nn.Module, Any],
    inputs: dict[nn.Module, Tensor],
) -> tuple[str, Tensor]:
    """Which linear module, and which rows of it, make each head of q, k or v: those that its gradient reaches.

    Where a norm after the projection spans all heads (OLMo2), the rows are found behind that norm: a head's query is
    its rows of the projection, and the norm works on the rows put together.
    """
    heads, width = states.shape[1], states.shape[-1]
    generator = torch.Generator().manual_seed(2)

    def support(tensor: Tensor) -> list[Tensor] | None:
        rows = []
        for head in range(heads):
            weights = torch.zeros_like(states)
            weights[:, head] = torch.randn(states[:, head].shape, generator=generator, dtype=torch.float64).to(states)
            (grad,) = torch.autograd.grad(states, tensor, weights, retain_graph=True, allow_unused=True)
            if grad is None:
                return None
            rows.append(grad.abs().flatten(0, -2).sum(dim=0).nonzero().flatten())
        return rows

    for module in linears:
        rows = support(outputs[module])
        if rows is None:
            continue
        if any(len(r) != width for r in rows):
            behind = next(
                (m for m in names if m in outputs and m is not module and inputs.get(m) is outputs[module]), None
            )
            rows = support(outputs[behind]) if behind is not None else None
        if rows is None or any(len(r) != width for r in rows) or len(torch.cat(rows).unique()) != heads * width:
            break
        return names[module], torch.stack(rows)
    raise ModelError(
        f"{name}: cannot tell which rows of which projection make the {part} of each head in layer {layer}",
        wanted="one linear module whose output, split by head, is that head's",
    )


def _post_norm(
    name: str,
    layer: int,
    attention: Attention,
    outputs: dict[nn.Module, Any],
    inputs: dict[nn.Module, Tensor],
    width: int,
) -> Norm:
    """The norm between the output projection and the stream (Gemma2, OLMo2), if there is one."""
    module = attention.write.port.module
    if not is_norm(module):
        return Norm(None)
    norm = measure_norm(module, width)
    if norm.kind not in ("rms", "layer") or inputs.get(module) is None:
        raise ModelError(
            f"{name}: heads of layer {layer} have no write of their own: the norm after attention has an unknown form",
            got=type(module).__name__,
            wanted="LayerNorm or RMSNorm",
        )
    return norm


# --- checking


def _check(hf: nn.Module, name: str, wiring: Wiring) -> None:
    """Attention's whole gradient with respect to what it reads must be the sum over its heads' queries, keys and
    values.
    """
    reads: list[Tensor] = []
    made: dict[nn.Module, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        reads.append(x.view_as(x))  # a tensor of its own to differentiate by
        return reads[-1]

    with ExitStack() as stack, torch.enable_grad():
        on_port(stack, wiring.layers[0].block.input, lambda x: x.detach().requires_grad_(True))
        for layer in wiring.layers:
            if layer.norm.module is not None and not _shared(layer):
                stack.callback(on_input(layer.norm.module, keep).remove)
            else:
                on_port(stack, layer.attention.entry, keep)
            for module in layer.projections:
                on_output(stack, module, lambda y, module=module: made.__setitem__(module, y))
        logits = _tiny_forward(hf).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(logits)
        flat = [made[m] for layer in wiring.layers for m in layer.projections]
        grads = torch.autograd.grad((logits * weights).sum(), [*reads, *flat])
    of = dict(zip([m for layer in wiring.layers for m in layer.projections], grads[len(reads) :], strict=True))
    for index, (layer, read, whole) in enumerate(zip(wiring.layers, reads, grads, strict=False)):
        total = torch.zeros_like(whole, dtype=torch.float64)
        for part in layer.parts.values():
            g = of[part.projection].detach().double().flatten(0, -2)[:, part.rows]
            total += torch.einsum("nrk,rkd->nd", g, part.weight(torch.float64)).view_as(total)
        through_norm = layer.norm.module is not None and not _shared(layer)
        if through_norm:
            x = read.detach().flatten(0, -2)
            x = x.double() if layer.norm.kind in ("rms", "layer") else x
            total = layer.norm.vjp(total.flatten(0, -2), x).view_as(total)
        error = float((total - whole.double()).norm() / whole.double().norm().clamp(min=1e-30))
        if not error <= _TOLERANCE.get(whole.dtype, 5e-2):
            raise ModelError(
                f"{name}: attention in layer {index} reads the stream by more than its heads' queries, keys and values",
                got=f"relative difference of gradients {error:.2g}",
                wanted=f"at most {_TOLERANCE.get(whole.dtype, 5e-2):.2g}",
            )


def _shared(layer: Layer) -> bool:
    """Whether attention and MLP read one norm's output (Phi, GPT-J)."""
    return layer.norm.module is not None and layer.norm.module is layer.mlp.norm
