"""Find a model's anatomy from one traced forward: the numbers say what is added to what, not the names of modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from headwater.core.anatomy.declared import ATTENTION_METHODS
from headwater.core.anatomy.trace import AttentionCall, Call, Trace, evaluating, probe_inputs, trace
from headwater.core.anatomy.types import Anatomy, Attention, Block, Mixer, Mlp, Port, Stack, Write
from headwater.core.errors import ModelError


def find_anatomy(hf: Any) -> Anatomy:
    """Trace `hf` once and say where its sites are. A model without a run of blocks is refused with what was looked
    for."""
    with evaluating(hf):
        found = trace(hf, probe_inputs(hf))
    stacks: dict[str, Stack] = {}
    refused: dict[str, str] = {}
    runs = _block_runs(hf, found)
    if not runs:
        raise ModelError(
            f"found no run of blocks in {type(hf).__name__}",
            wanted="a ModuleList whose items are called one after the other, each on the last one's output",
        )
    for prefix, (name, calls) in _prefixes(runs).items():
        blocks = tuple(_block(found, call, index, refused, prefix) for index, call in enumerate(calls))
        last = _stream_out(calls[-1])[1]
        stacks[prefix] = Stack(prefix, name, blocks, last.shape[-1], _final_norm(found, calls[-1], last))
    main = stacks.get("") or stacks.get("decoder") or stacks.get("text") or next(iter(stacks.values()))
    get_unembed = getattr(hf, "get_output_embeddings", None)
    logits = getattr(found.output, "logits", None)
    return Anatomy(
        family=getattr(hf.config, "model_type", type(hf).__name__),
        stacks=stacks,
        main=main,
        unembed=get_unembed() if get_unembed else None,
        has_logits=isinstance(logits, torch.Tensor),
        refused=refused,
    )


# --- runs of blocks ---------------------------------------------------------------------------------------------------


def _block_runs(hf: nn.Module, found: Trace) -> dict[str, list[Call]]:
    """ModuleLists whose items ran one after the other, each on what the one before it gave; the outermost ones."""
    first_call: dict[nn.Module, Call] = {}
    for call in found.calls:
        first_call.setdefault(call.module, call)
    runs: dict[str, list[Call]] = {}
    for name, module in hf.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in runs):
            continue
        calls = [first_call[item] for item in module if item in first_call]
        if len(calls) == len(module) > 0 and _chained(calls) and _is_layer_list(hf, module):
            runs[name] = calls
    return runs


def _chained(calls: list[Call]) -> bool:
    try:
        ports = [(_stream_in(call)[1], _stream_out(call)[1]) for call in calls]
    except ModelError:
        return False
    if any(x.ndim != 3 or x.shape != y.shape for x, y in ports):
        return False
    return all(_same(out, into) for (_, out), (into, _) in pairwise(ports))


def _is_layer_list(hf: nn.Module, modules: nn.ModuleList) -> bool:
    """A list of one item chains trivially; it is taken where the model's own registry, or its attention, says it is a
    layer."""
    if len(modules) > 1:
        return True
    recorded: set[str] = set()
    for module in hf.modules():
        registry = getattr(module, "_can_record_outputs", None) or {}
        for target in registry.values():
            target = getattr(target, "target_class", target)
            if isinstance(target, type):
                recorded.add(target.__name__)
    return type(modules[0]).__name__ in recorded or any(
        "attention" in type(m).__name__.lower() for m in modules[0].modules()
    )


def _prefixes(runs: dict[str, list[Call]]) -> dict[str, tuple[str, list[Call]]]:
    if len(runs) == 1:
        return {"": next(iter(runs.items()))}
    named: dict[str, tuple[str, list[Call]]] = {}
    for name, calls in runs.items():
        words = name.lower()
        # "vision_model.encoder.layers" is the vision stack: modality is the stronger word.
        prefix = next(
            (word for word in ("text", "vision", "audio", "decoder", "encoder") if word in words), f"stack{len(named)}"
        )
        named[prefix if prefix not in named else f"stack{len(named)}"] = (name, calls)
    return named


def _final_norm(found: Trace, last: Call, stream: torch.Tensor) -> nn.Module | None:
    for call in found.calls:
        if call.enter > last.exit and is_norm(call.module) and any(_same(x, stream) for _, x in call.inputs()):
            return call.module
    return None


# --- one block --------------------------------------------------------------------------------------------------------


class _Inside:
    """The calls of one block, and the questions the finder asks of them."""

    def __init__(self, found: Trace, block: Call) -> None:
        self.block = block
        self.calls = found.within(block)
        self.times = Counter(c.module for c in self.calls)
        self.attention = [a for a in found.attention if block.enter < a.at < block.exit]
        self.key_in, self.stream = _stream_in(block)
        self.key_out, self.out = _stream_out(block)

    def port_in(self, call: Call, key: int | str) -> Port:
        x = dict(call.inputs())[key]
        return Port(call.module, call.name, "in", key, flat=x.ndim == 2)

    def find_write(
        self, total: torch.Tensor, stream: torch.Tensor, after: int, before: int
    ) -> tuple[Write, Call] | None:
        """The module output W, in a span of time, with total = stream + s W: the closest, and of equals the last."""
        change = total.double() - stream.double()
        if float(change.norm()) == 0.0:
            return None
        rounding = _rounding(total, stream)
        best: tuple[float, Write, Call] | None = None
        for call in reversed(self.calls):
            # A module that runs twice in a block (one dropout for both sub-layers) cannot be told apart by a hook.
            if not (after < call.exit < before) or self.times[call.module] > 1:
                continue
            for key, y in call.outputs():
                fit = _proportional(change, y, rounding)
                if fit is not None and (best is None or fit[1] < best[0]):
                    best = fit[1], Write(Port(call.module, call.name, "out", key, flat=y.ndim == 2), fit[0]), call
        return best and best[1:]

    def find_sum(self, stream: torch.Tensor, after: int) -> tuple[Call, int | str, torch.Tensor, Write] | None:
        """The first module, entered after `after`, that reads stream + s W; and that W."""
        for call in self.calls:
            if call.enter <= after:
                continue
            for key, x in call.inputs():
                if x.numel() != stream.numel() or x.shape[-1] != stream.shape[-1]:
                    continue
                x = x.reshape(stream.shape)
                if _same(x, stream):
                    continue
                write = self.find_write(x, stream, after, call.enter)
                if write:
                    return call, key, x, write[0]
        return None

    def reader_of(self, call: Call) -> Call:
        """Where a tensor first read by `call` is really used: the norm inside it, if one of its first descendants is a
        norm."""
        keys = call.inputs()
        for inner in self.calls:
            if call.enter < inner.enter and inner.exit < call.exit and is_norm(inner.module):
                if any(x is y for _, x in inner.inputs() for _, y in keys):
                    return inner
                break
        return call

    def consumer(self, tensor: torch.Tensor, after: int, exclude: Iterable[Call]) -> tuple[Call, int | str] | None:
        """The first module entered after a moment that reads this very tensor."""
        spans = [(c.enter, c.exit) for c in exclude]
        for call in self.calls:
            if call.enter <= after or any(a <= call.enter <= b for a, b in spans):
                continue
            for key, x in call.inputs():
                if x is tensor or (x.numel() == tensor.numel() and x.data_ptr() == tensor.data_ptr()):
                    return call, key
        return None


def _block(found: Trace, call: Call, index: int, refused: dict[str, str], prefix: str) -> Block:
    inside = _Inside(found, call)
    slash = f"{prefix}/" if prefix else ""
    into = Port(call.module, call.name, "in", inside.key_in)
    out = Port(call.module, call.name, "out", inside.key_out)

    def opaque(why: str) -> Block:
        for kind in ("attn_in", "attn_out", "mlp_in", "mlp_out", "resid_mid"):
            refused.setdefault(slash + kind, f"{type(call.module).__name__}: {why}")
        return Block(index, call.module, call.name, into, out, "opaque")

    if not inside.attention:
        write = inside.find_write(inside.out, inside.stream, call.enter, call.exit)
        if write is None:
            return opaque("no module's output accounts for what the block adds to the stream")
        refused.setdefault(
            slash + "attn_out", f"{type(call.module).__name__} has no attention; its sites are mixer_in and mixer_out"
        )
        port, entered = write[0], write[1]
        key = entered.inputs()[0][0] if entered.inputs() else 0
        return Block(index, call.module, call.name, into, out, "mixer", mixer=Mixer(inside.port_in(entered, key), port))

    parts: list[dict[str, Any]] = []
    stream = inside.stream
    sums: list[tuple[Call, int | str, torch.Tensor, Write]] = []
    for attended in inside.attention:
        part = _attention_parts(inside, attended)
        if part is None:
            return opaque("what its attention gives is not read by a linear module")
        parts.append(part)
        found_sum = inside.find_sum(stream, attended.at)
        if found_sum is None:
            break
        sums.append(found_sum)
        stream = found_sum[2]

    if len(sums) == len(parts):
        return _sequential(inside, index, into, out, parts, sums, opaque)
    if len(parts) == 1 and not sums:
        return _parallel(inside, index, into, out, parts[0], opaque)
    return opaque("its sub-layers add to the stream in a way that was not recognized")


def _attention_parts(inside: _Inside, attended: AttentionCall) -> dict[str, Any] | None:
    module_call = next((c for c in inside.calls if c.module is attended.module), None)
    if module_call is None:
        return None
    flat = attended.out.flatten(-2)
    for call in inside.calls:
        weight = getattr(call.module, "weight", None)
        if call.enter < attended.at or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        if any(x.numel() == flat.numel() and _same(x.reshape(flat.shape), flat) for _, x in call.inputs()):
            key, entry = module_call.inputs()[0]
            norm = next(
                (
                    c.module
                    for c in inside.calls
                    if c.exit < module_call.enter and c.output is entry and is_norm(c.module)
                ),
                None,
            )
            norm = norm or next((c.module for c in inside.calls if is_norm(c.module) and c.output is entry), None)
            return {
                "module": attended.module,
                "name": module_call.name,
                "entry": inside.port_in(module_call, key),
                "entry_tensor": entry,
                "call": module_call,
                "out_proj": call.module,
                "out_proj_name": call.name,
                "out_proj_exit": call.exit,
                "norm": norm,
                "n_heads": attended.q.shape[1],
                "n_kv_heads": attended.k.shape[1],
                "d_head": attended.q.shape[-1],
                "d_value": attended.v.shape[-1],
                "method": ATTENTION_METHODS.get(type(attended.module).__name__),
            }
    return None


def _make_attention(part: dict[str, Any], write: Write) -> Attention:
    kept = {key: value for key, value in part.items() if key not in ("entry_tensor", "call", "out_proj_exit")}
    return Attention(write=write, **kept)


def _sequential(
    inside: _Inside, index: int, into: Port, out: Port, parts: list[Any], sums: list[Any], opaque: Any
) -> Block:
    reader, _, stream, _ = sums[-1]
    norm_call = inside.reader_of(reader)
    mid = inside.port_in(norm_call, next(k for k, x in norm_call.inputs() if _same(x.reshape(stream.shape), stream)))
    attention = _make_attention(parts[0], sums[0][3])
    cross = _make_attention(parts[1], sums[1][3]) if len(parts) > 1 else None
    cross_mid = None
    if cross is not None:
        cross_reader = inside.reader_of(sums[0][0])
        cross_mid = inside.port_in(cross_reader, cross_reader.inputs()[0][0])
    common = (index, inside.block.module, inside.block.name, into, out)

    write = inside.find_write(inside.out, stream, norm_call.enter, inside.block.exit)
    if write is not None:
        mlp = _mlp(inside, norm_call, write[0], [p["call"] for p in parts])
        if mlp is None:
            return opaque("no module reads the stream for its MLP")
        return Block(*common, "sequential", attention, cross, mlp, None, mid, cross_mid)

    # Post-norm: the sum goes through a norm, and the norm's output is the stream.
    if is_norm(norm_call.module) and len(norm_call.outputs()) == 1:
        middle = norm_call.outputs()[0][1].reshape(stream.shape)
        last = next((c for c in reversed(inside.calls) if is_norm(c.module) and _same_size(c, inside.out)), None)
        if last is not None and last is not norm_call and _same(last.outputs()[0][1].reshape(stream.shape), inside.out):
            total = last.inputs()[0][1].reshape(stream.shape)
            write = inside.find_write(total, middle, norm_call.exit, last.enter)
            mlp = write and _mlp(inside, norm_call, write[0], [p["call"] for p in parts], before=last.enter)
            if mlp:
                middle_port = Port(norm_call.module, norm_call.name, "out", norm_call.outputs()[0][0], flat=mid.flat)
                return Block(*common, "post_norm", attention, cross, mlp, None, middle_port, cross_mid)
    return opaque("the block's output is not the stream before its MLP plus what one module gives")


def _parallel(inside: _Inside, index: int, into: Port, out: Port, part: dict[str, Any], opaque: Any) -> Block:
    attended = part["call"]
    unique = [c for c in inside.calls if inside.times[c.module] == 1]
    inner = [(c, k, y) for c in unique for k, y in c.outputs() if part["out_proj_exit"] <= c.exit <= attended.exit]
    outer = [c for c in unique if not (attended.enter <= c.enter <= attended.exit)]
    best: tuple[float, Any, Any] | None = None
    change = inside.out.double() - inside.stream.double()
    for a_call, a_key, a in sorted(inner, key=lambda found: -found[0].exit):
        if a.numel() != change.numel():
            continue
        rest = change - a.double().reshape(change.shape)
        for m_call in reversed(outer):
            for m_key, m in m_call.outputs():
                fit = _proportional(rest, m, 2 * _rounding(inside.out, inside.stream, a.reshape(change.shape)))
                if fit is not None and fit[0] == 1.0 and (best is None or fit[1] < best[0]):
                    best = fit[1], (a_call, a_key), (m_call, m_key)
    if best is None:
        return opaque("the block's output is not its input plus its attention plus one module more")
    (a_call, a_key), (m_call, m_key) = best[1:]
    attention = _make_attention(part, Write(Port(a_call.module, a_call.name, "out", a_key)))
    write = Write(Port(m_call.module, m_call.name, "out", m_key))
    # Its MLP reads a norm of its own, or the same tensor that attention reads, or the bare stream.
    own_norms = [c.outputs()[0][1] for c in inside.calls if is_norm(c.module) and c.module is not part["norm"]]
    readers = [
        inside.consumer(t, inside.block.enter, [attended]) for t in (*own_norms, part["entry_tensor"], inside.stream)
    ]
    reader = next((r for r in readers if r is not None and not is_norm(r[0].module)), None)
    if reader is None:
        return opaque("no module reads the stream for its MLP")
    call, key = reader
    read = dict(call.inputs())[key]
    norm = next((c.module for c in inside.calls if is_norm(c.module) and c.outputs()[0][1] is read), None)
    mlp = _finish_mlp(inside, inside.port_in(call, key), write, norm, call.enter, [attended], part["out_proj"])
    return Block(index, inside.block.module, inside.block.name, into, out, "parallel", attention, None, mlp)


def _mlp(inside: _Inside, norm_call: Call, write: Write, attended: list[Call], before: int | None = None) -> Mlp | None:
    if is_norm(norm_call.module):
        reader = inside.consumer(norm_call.outputs()[0][1], norm_call.exit, attended)
        if reader is None:
            return None
        call, key = reader
        norm = norm_call.module
    else:
        call, key, norm = norm_call, norm_call.inputs()[0][0], None
    return _finish_mlp(inside, inside.port_in(call, key), write, norm, call.enter, attended, None, before)


def _finish_mlp(
    inside: _Inside,
    entry: Port,
    write: Write,
    norm: nn.Module | None,
    start: int,
    attended: list[Call],
    out_proj: nn.Module | None,
    before: int | None = None,
) -> Mlp:
    spans = [(c.enter, c.exit) for c in attended]
    calls = [c for c in inside.calls if c.enter >= start and not any(a <= c.enter <= b for a, b in spans)]
    experts = next(
        (c for c in calls if hasattr(c.module, "num_experts") and _is_stack(getattr(c.module, "down_proj", None))), None
    )
    if experts is not None:
        return Mlp(entry, write, norm, experts=experts.module, experts_name=experts.name)
    d_model = inside.stream.shape[-1]
    for call in reversed(calls):
        weight = getattr(call.module, "weight", None)
        is_linear = isinstance(weight, torch.Tensor) and weight.ndim == 2 and call.module is not out_proj
        if is_linear and call.outputs() and call.outputs()[0][1].shape[-1] == d_model and call.inputs():
            return Mlp(entry, write, norm, inside.port_in(call, call.inputs()[0][0]), call.module)
    return Mlp(entry, write, norm)


# --- small questions --------------------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """A module without children whose weights, if any, are vectors: LayerNorm, RMSNorm and their kin (not Identity or
    Dropout)."""
    if any(True for _ in module.children()) or isinstance(module, nn.Identity | nn.Dropout):
        return False
    looks = "norm" in type(module).__name__.lower()
    return looks and all(p.ndim <= 1 for p in module.parameters())


def _is_stack(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and weight.ndim == 3


def _same_size(call: Call, stream: torch.Tensor) -> bool:
    return bool(call.outputs()) and call.outputs()[0][1].numel() == stream.numel()


def _stream_in(call: Call) -> tuple[int | str, torch.Tensor]:
    if not call.inputs():
        raise ModelError(f"{call.name} was called with no tensor")
    named = dict(call.inputs())
    return ("hidden_states", named["hidden_states"]) if "hidden_states" in named else call.inputs()[0]


def _stream_out(call: Call) -> tuple[int | None, torch.Tensor]:
    if not call.outputs():
        raise ModelError(f"{call.name} gave no tensor")
    return call.outputs()[0]


def _rounding(*tensors: torch.Tensor) -> float:
    """How far rounding may have moved a sum of these tensors (as the norm of the error)."""
    eps = max(1e-7, *(torch.finfo(t.dtype).eps for t in tensors))
    return eps * sum(float(t.double().norm()) for t in tensors)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x is y:
        return True
    if x.shape != y.shape:
        return False
    return float((x.double() - y.double()).norm()) <= 0.01 * _rounding(x, y)


def _proportional(change: torch.Tensor, write: torch.Tensor, rounding: float) -> tuple[float, float] | None:
    """(s, error) with change = s * write up to rounding: exactly 1.0 where 1 will do, else the shortest decimal that
    will."""
    if write.numel() != change.numel() or write.shape[-1] != change.shape[-1]:
        return None
    c, w = change.double().flatten(), write.double().flatten()
    norm = float(w @ w)
    if norm == 0.0:
        return None
    best = float(c @ w) / norm
    least = float((c - best * w).norm())
    if best <= 0 or least > min(rounding, 0.2 * float(c.norm())):
        return None
    # Nobody writes a multiplier of 0.99999: where the stream is thousands of times its writes, rounding alone gives
    # that.
    if abs(best - 1.0) < 1e-3 and (error := float((c - w).norm())) <= rounding:
        return 1.0, error
    # A multiplier is a number that somebody wrote into a config: take the shortest that fits as well as any.
    for scale in (1.0, *(float(f"{best:.{digits}g}") for digits in range(1, 7))):
        error = float((c - scale * w).norm())
        if error <= 1.02 * least + 1e-3 * rounding:
            return scale, error
    return best, least
