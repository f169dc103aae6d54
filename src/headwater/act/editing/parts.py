"""The matrices that write to the stream, in one layout, and what edits are made from: keys, and readouts."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.act.applying import name_of
from headwater.act.edit import Delta
from headwater.act.measuring import said
from headwater.core.anatomy import Attention, Mlp, linear_weight
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from headwater.behavior.bind import Bound, Group
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """A linear module's weight as [out, in], and changes of it as they are stored (GPT-2 stores the transpose).

    parameter: its name in the model. scale: what its output is multiplied by on its way into the stream.
    """

    module: nn.Module
    parameter: str
    flipped: bool
    scale: float = 1.0

    @staticmethod
    def of(model: "Model", module: nn.Module, scale: float = 1.0) -> "Matrix":
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise MethodError("only linear modules can be edited", got=type(module).__name__)
        return Matrix(
            module=module, parameter=name_of(model.hf, weight), flipped=type(module).__name__ == "Conv1D", scale=scale
        )

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        return linear_weight(self.module).detach()

    @property
    def bias(self) -> Tensor | None:
        """[out]."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    def low_rank(self, left: Tensor, right: Tensor) -> Delta:
        """A change by `left` [out, R] @ `right` [R, in]."""
        like = self.weight
        left, right = left.to(like).cpu(), right.to(like).cpu()
        return Delta.low_rank(self.parameter, *((right.T, left.T) if self.flipped else (left, right)))

    def columns(self, index: "Sequence[int] | Tensor", change: Tensor) -> Delta:
        """A change of the columns `index` (what single inputs write) by `change` [out, n]."""
        change = change.to(self.weight).cpu()
        return Delta.slices(self.parameter, index, change.T if self.flipped else change, dim=0 if self.flipped else 1)

    def scaled(self, factors: "Sequence[tuple[Tensor, float]]") -> Delta:
        """The change that multiplies columns by their factors; a bias stays."""
        columns = torch.cat([each for each, _ in factors])
        grown = torch.cat([torch.full((len(each),), f - 1.0, dtype=torch.float64) for each, f in factors])
        weight = self.weight[:, columns.to(self.weight.device)]
        return self.columns(columns, weight * grown.to(weight))


def mlp_of(model: "Model", layer: int) -> Mlp:
    """A layer's MLP, whose neurons are written by one matrix. Raises MethodError for any other."""
    block = _block(model, layer)
    if block.mlp is None or block.mlp.down_proj is None or block.mlp.neurons is None:
        why = "its experts have a matrix each" if block.mlp is not None and block.mlp.experts is not None else ""
        raise MethodError(f"layer {layer} of {model.name} has no MLP with one down-projection", got=why or None)
    return block.mlp


def down_projection(model: "Model", layer: int) -> Matrix:
    """What writes a layer's neurons to the stream."""
    mlp = mlp_of(model, layer)
    return Matrix.of(model, mlp.down_proj, mlp.write.scale)  # type: ignore[arg-type]


def attention_of(model: "Model", layer: int) -> Attention:
    """A layer's attention. Raises MethodError where it has none."""
    block = _block(model, layer)
    if block.attention is None:
        raise MethodError(f"layer {layer} of {model.name} has no attention")
    return block.attention


def out_projection(model: "Model", layer: int) -> Matrix:
    """What writes a layer's heads to the stream."""
    attention = attention_of(model, layer)
    return Matrix.of(model, attention.out_proj, attention.write.scale)


def head_columns(model: "Model", layer: int, head: int) -> Tensor:
    """Which columns of the output projection are a head's."""
    attention = attention_of(model, layer)
    if not 0 <= head < attention.n_heads:
        raise MethodError(f"{model.name} has no head a{layer}.h{head}", wanted=f"h0 to h{attention.n_heads - 1}")
    return torch.arange(head * attention.d_value, (head + 1) * attention.d_value)


def heads_of(model: "Model", names: "Sequence[str]") -> list[tuple[int, int]]:
    """(layer, head) of heads by name: `a5.h3`, `head.5.h3`. Raises MethodError."""
    from headwater.core.sites import Site

    found: list[tuple[int, int]] = []
    for name in names:
        site = Site.parse(name)
        if site.kind not in ("head", "z") or not isinstance(site.layer, int) or not isinstance(site.head, int):
            raise MethodError("this is not a head", got=name, wanted="heads, such as a5.h3")
        head_columns(model, site.layer, site.head)
        found.append((site.layer, site.head))
    if not found:
        raise MethodError("no head is named", wanted="heads, such as a5.h3")
    return found


def writes_directly(model: "Model", layer: int, kind: str) -> bool:
    """Whether what a layer's last matrix gives is what is added to the stream, up to its scale: no norm stands between.

    kind: "attn_out" or "mlp_out". Measured on a few tokens.
    """
    block = _block(model, layer)
    part = block.attention if kind == "attn_out" else block.mlp
    module = part.out_proj if isinstance(part, Attention) else part.down_proj if part is not None else None
    if part is None or module is None or block.order == "post_norm":
        return False
    given: list[Tensor] = []
    tokens = torch.arange(1, 5)[None] % max(2, model.d_vocab)  # 0 is often padding
    hook = module.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    try:
        added = model.run(tokens, capture=[f"{kind}.{layer}"], logits="none")[f"{kind}.{layer}"]
    finally:
        hook.remove()
    made = part.write.scale * given[-1].reshape(added.shape)
    return bool((made - added).abs().max() <= 1e-4 * added.abs().max())


def check_direct(model: "Model", layer: int, kind: str, fix: str = "") -> None:
    """Raise MethodError where a norm stands between a layer's last matrix and the stream: a direction of the one is
    none of the other."""
    if not writes_directly(model, layer, kind):
        raise MethodError(f"a norm stands between {kind}.{layer} and the stream of {model.name}", fix=fix or None)


def readouts(model: "Model", bound: "Bound", metric: str) -> "list[tuple[Group, Tensor, Any]]":
    """For each group of pairs: the gradient of the metric at the last layer's stream, at the last token [B, D], which
    is how far each write there counts; and the run, which captured `neurons` and `z` of every layer."""
    last, found = f"resid_post.{model.n_layers - 1}", []
    wanted = [last, *(str(site) for kind in ("z", "neurons") for site in model.sites() if site.kind == kind)]
    for group in bound.groups:
        run = model.run(group.clean, capture=wanted, logits="last", grad=True)
        total = said(metric, run.logits, group).sum()
        found.append((group, run.grads(total, [last])[last][:, -1].detach(), run))
    return found


@contextmanager
def written(module: nn.Module, change: Tensor, rows: Tensor, places: Tensor) -> "Generator[None]":
    """Inside this block `change` [out] is added to what a linear module gives for row `rows[i]` at `places[i]`."""

    def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        whole = output.reshape(len(rows), -1, output.shape[-1])
        mask = torch.zeros(whole.shape[:2], dtype=output.dtype, device=output.device)
        mask[rows, places] = 1.0
        return (whole + mask[..., None] * change).reshape(output.shape)

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def frozen(hf: nn.Module) -> "Generator[None]":
    """No weight asks for a gradient inside this block, and the model evaluates."""
    asked = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    training = hf.training
    for parameter in asked:
        parameter.requires_grad_(False)
    hf.eval()
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        hf.train(training)


def _block(model: "Model", layer: int) -> Any:
    if not 0 <= layer < model.n_layers:
        raise MethodError(f"{model.name} has no layer {layer}", wanted=f"0 to {model.n_layers - 1}")
    return model.anatomy.main.blocks[layer]
