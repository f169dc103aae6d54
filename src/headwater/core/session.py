"""One hooked stretch of computation: puts hooks where sites live, edits and keeps what passes, and takes every hook off
again."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from headwater.core.anatomy import Anatomy, Attention, Block, Port, Stack
from headwater.core.anatomy.trace import attention_names
from headwater.core.attention import attend_plainly, attention_session, eager_of, method_session, mix_values
from headwater.core.errors import InterventionError, SiteError
from headwater.core.experts import experts_session
from headwater.core.interventions import Intervention
from headwater.core.places import Window, select_index, token_axis
from headwater.core.sites import Site

Edit = Callable[[torch.Tensor], torch.Tensor]
_INSIDE = ("q", "k", "v", "scores", "pattern", "z")
_NOTHING: frozenset[str] = frozenset()


class Stopped(Exception):
    """Raised by a hook when nothing further is needed; never leaves headwater."""


@dataclass
class Kept:
    """A captured value. With gradients, `whole` is the tensor on the path from input to output and `select` gives the
    site's part."""

    value: torch.Tensor
    whole: torch.Tensor | None = None
    select: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass
class _Here:
    """What the block that is running was given."""

    shape: tuple[int, int] = (0, 0)
    stream: torch.Tensor | None = None
    z: torch.Tensor | None = None


@dataclass
class Session:
    """Captures and interventions for one or more forwards of one model.

    captures: concrete sites (no pattern). interventions: concrete likewise. leaf: detach the stream where it enters the
    first block and let autograd start there. stop: (stack prefix, layer) after whose block the forward ends.
    """

    hf: Any
    anatomy: Anatomy
    captures: list[Site]
    interventions: list[Intervention]
    window: Window = field(default_factory=Window)
    grad: bool = False
    leaf: bool = False
    stop: tuple[str, int] | None = None
    enabled: bool = True
    kept: dict[str, Kept] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)
    forwards: int = 0

    def __post_init__(self) -> None:
        self._reads: dict[tuple[str, int | None, str], list[Site]] = defaultdict(list)
        self._edits: dict[tuple[str, int | None, str], list[Intervention]] = defaultdict(list)
        for site in self.captures:
            self._reads[self._key(site)].append(site)
        for intervention in self.interventions:
            self._edits[self._key(intervention.site)].append(intervention)
        self._kinds: dict[tuple[str, int | None], set[str]] = defaultdict(set)
        for prefix, layer, kind in (*self._reads, *self._edits):
            self._kinds[prefix, layer].add(kind)
        parts = any(s.head is not None or s.expert is not None or s.pos is not None for s in self.captures)
        self._looks_only = not (parts or self.interventions or self.grad or self.leaf or self.stop)
        self._here: dict[str, _Here] = defaultdict(_Here)
        self._rows = self.window.rows

    def _window(self, prefix: str) -> Window:
        """What the running forward covers; an encoder, or a second tower, always sees the whole of its own input."""
        if prefix in ("", self.anatomy.main.prefix):
            return self.window
        return dataclasses.replace(self.window, prompt_length=None, offset=0, open_ended=False)

    def _key(self, site: Site) -> tuple[str, int | None, str]:
        return (site.stack, site.layer if isinstance(site.layer, int) else None, site.kind)

    # --- installing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Generator[Session]:
        """Hooks are on inside this block, and off after it whatever happens."""
        with ExitStack() as undo:
            self._undo = undo
            self._attention: dict[nn.Module, Any] = {}
            self._methods: dict[nn.Module, str] = {}
            self._experts: dict[nn.Module, Edit] = {}
            needed = self._kinds
            undo.callback(self.hf.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True).remove)
            for prefix, stack in self.anatomy.stacks.items():
                for block in stack.blocks:
                    embeds = block.index == 0 and ((prefix, None) in needed or self.leaf)
                    if (prefix, block.index) in needed or embeds or self.stop == (prefix, block.index):
                        self._install_block(prefix, stack, block)
            if (("", None, "logits") in self._reads) or (("", None, "logits") in self._edits):
                undo.callback(self.hf.register_forward_hook(self._logits).remove)
            if self._attention:
                plain = {m: h for m, h in self._attention.items() if m not in self._methods}
                undo.enter_context(attention_session(plain, _attention_names(self.hf, self._attention)))
                own = {m: h for m, h in self._attention.items() if m in self._methods}
                undo.enter_context(method_session(own, self._methods))
            if self._experts:
                undo.enter_context(experts_session(self._experts, whole=self.grad))
            yield self

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.enabled:
            return
        self.forwards += 1
        cache = kwargs.get("past_key_values")
        self.window.offset = (
            int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        )
        if not self.window.open_ended:
            return
        main = kwargs.get(getattr(self.hf, "main_input_name", "input_ids"))
        if self.hf.config.is_encoder_decoder:
            main = kwargs.get("decoder_input_ids", main)
        main = args[0] if main is None and args else main
        main = kwargs.get("inputs_embeds") if main is None else main
        if self._rows is not None and isinstance(main, torch.Tensor):
            # Beams, and several continuations of a prompt, are rows that follow one another.
            self.window.rows = self._rows.repeat_interleave(max(1, len(main) // len(self._rows)))
        elif self._rows is None and self.window.offset == 0:
            # Somebody else's call inside `intervene`: the first forward brings the prompt.
            if isinstance(main, torch.Tensor) and main.ndim >= 2:
                self.window.n_prompts, self.window.prompt_length = main.shape[0], main.shape[1]
            else:
                self.window.n_prompts = self.window.prompt_length = None

    def _wants(self, prefix: str, layer: int | None, *kinds: str) -> bool:
        return not self._kinds.get((prefix, layer), _NOTHING).isdisjoint(kinds)

    def _install_block(self, prefix: str, stack: Stack, block: Block) -> None:
        layer = block.index
        kinds = self._kinds.get((prefix, layer), _NOTHING)
        if self._looks_only and kinds <= block.plain.keys() and not (layer == 0 and (prefix, None) in self._kinds):
            for kind in kinds:
                self._look(str(self._reads[prefix, layer, kind][0]), block.plain[kind])
            return
        wants = functools.partial(self._wants, prefix, layer)
        edits_mid = (prefix, layer, "resid_mid") in self._edits
        edits_cross_mid = edits_mid and block.cross is not None

        def enter(x: torch.Tensor) -> torch.Tensor:
            here = self._here[prefix]
            if layer == 0:
                if self.leaf:
                    x = x.detach().requires_grad_(True)
                x = self._pass(prefix, None, "embed", x)
            x = self._pass(prefix, layer, "resid_pre", x)
            here.shape, here.stream, here.z = (x.shape[0], x.shape[1]), x if edits_mid else None, None
            return x

        embeds = layer == 0 and (self.leaf or self._wants(prefix, None, "embed"))
        inside = wants("resid_pre", "resid_mid", "head", "cross_head", "neurons")
        if embeds or inside or block.flat:
            self._hook(prefix, block.input, enter)
        if block.attention is not None:
            self._install_attention(prefix, block, block.attention, "")
        if block.cross is not None:
            self._install_attention(prefix, block, block.cross, "cross_")
            if edits_cross_mid and block.cross_mid is not None:
                self._hook(prefix, block.cross_mid, functools.partial(self._remember_stream, prefix))
        if block.mid is not None and wants("resid_mid"):
            if block.order == "post_norm":
                self._hook(prefix, block.mid, self._passing(prefix, layer, "resid_mid"))
            else:
                # Kept as it is, flat or not: the residual goes around the norm with this very tensor.
                self._hook(
                    prefix, dataclasses.replace(block.mid, flat=False), functools.partial(self._keep_mid, prefix, layer)
                )
        if block.mlp is not None:
            if wants("mlp_in"):
                self._hook(prefix, block.mlp.entry, self._passing(prefix, layer, "mlp_in"))
            if wants("neurons"):
                self._install_neurons(prefix, block)
            if wants("mlp_out"):
                self._hook(prefix, block.mlp.write.port, self._scaled(prefix, layer, "mlp_out", block.mlp.write.scale))
        if block.mixer is not None:
            if wants("mixer_in"):
                self._hook(prefix, block.mixer.entry, self._passing(prefix, layer, "mixer_in"))
            if wants("mixer_out"):
                self._hook(
                    prefix, block.mixer.write.port, self._scaled(prefix, layer, "mixer_out", block.mixer.write.scale)
                )
        if self.stop == (prefix, layer):

            def leave(x: torch.Tensor) -> torch.Tensor:
                self._pass(prefix, layer, "resid_post", x)
                raise Stopped

            self._hook(prefix, block.output, leave)
        elif wants("resid_post"):
            self._hook(prefix, block.output, self._passing(prefix, layer, "resid_post"))

    def _install_attention(self, prefix: str, block: Block, part: Attention, cross: str) -> None:
        layer = block.index
        wants = functools.partial(self._wants, prefix, layer)
        if wants(f"{cross}attn_in"):
            self._hook(prefix, part.entry, self._passing(prefix, layer, f"{cross}attn_in"))
        if wants(*(cross + kind for kind in _INSIDE)):
            self._attention[part.module] = functools.partial(self._attend, prefix, layer, part, cross)
            if part.method:
                self._methods[part.module] = part.method
        if wants(f"{cross}head"):
            into = Port(part.out_proj, part.out_proj_name, "in", 0)
            self._hook(prefix, into, functools.partial(self._remember_z, prefix))
            out = Port(part.out_proj, part.out_proj_name, "out")
            self._hook(prefix, out, functools.partial(self._heads, prefix, layer, part, f"{cross}head"))
        if wants(f"{cross}attn_out"):
            self._hook(prefix, part.write.port, self._scaled(prefix, layer, f"{cross}attn_out", part.write.scale))
        last = cross or block.cross is None
        if last and block.order == "sequential" and (prefix, layer, "resid_mid") in self._edits:
            # The stream before the MLP is a sum that no module outputs: change its last summand by what the sum shall
            # change.
            def arrive(x: torch.Tensor) -> torch.Tensor:
                stream = self._here[prefix].stream
                if stream is None:
                    raise SiteError(f"resid_mid.{layer} cannot be written: its block was not entered")
                total = stream + part.write.scale * x
                change = self._edit(prefix, layer, "resid_mid", total) - total
                return x + change / part.write.scale

            self._hook(prefix, part.write.port, arrive)

    def _install_neurons(self, prefix: str, block: Block) -> None:
        mlp, layer = block.mlp, block.index
        if mlp is None:
            return
        if mlp.experts is not None:

            def edit(neurons_NEM: torch.Tensor) -> torch.Tensor:
                if not self.enabled:
                    return neurons_NEM
                shaped = neurons_NEM.reshape(*self._here[prefix].shape, *neurons_NEM.shape[1:])
                after = self._pass(prefix, layer, "neurons", shaped)
                return neurons_NEM if after is shaped and not self.grad else after.reshape(neurons_NEM.shape)

            self._experts[mlp.experts] = edit
        elif mlp.neurons is not None:
            self._hook(prefix, mlp.neurons, self._passing(prefix, layer, "neurons"))

    # --- what passes --------------------------------------------------------------------------------------------------

    def _scaled(self, prefix: str, layer: int, kind: str, scale: float) -> Edit:
        """Read and edit what is added to the stream (scale * x), where x is what the module gives."""
        if scale == 1.0:
            return self._passing(prefix, layer, kind)

        def passing(x: torch.Tensor) -> torch.Tensor:
            added = scale * x
            edited = self._edit(prefix, layer, kind, added)
            if self.grad and edited is added:
                self._keep(prefix, layer, kind, x, to_site=lambda t: t * scale, to_grad=lambda g: g / scale)
                return x
            self._read(prefix, layer, kind, edited)
            return x if edited is added else x + (edited - added) / scale

        return passing

    def _passing(self, prefix: str, layer: int, kind: str) -> Edit:
        """`_pass` for one place, ready to be called: where whole sites are only read, no more than keeping them."""
        key = (prefix, layer, kind)
        sites = self._reads.get(key, ())
        parts = any(s.head is not None or s.expert is not None or s.pos is not None for s in sites)
        if parts or self.grad or key in self._edits:
            return functools.partial(self._pass, prefix, layer, kind)
        names, kept = [str(site) for site in sites], self.kept

        def keep(x: torch.Tensor) -> torch.Tensor:
            for name in names:
                kept[name] = Kept(x)
            return x

        return keep

    def _pass(self, prefix: str, layer: int | None, kind: str, x: torch.Tensor) -> torch.Tensor:
        x = self._edit(prefix, layer, kind, x)
        if self.grad and kind.endswith("_in") and (prefix, layer, kind) in self._reads:
            # The same tensor may be read by others (a parallel block's MLP, the residual); the site is what this reader
            # gets of it.
            x = x.view_as(x)
        return self._read(prefix, layer, kind, x)

    def _read(self, prefix: str, layer: int | None, kind: str, x: torch.Tensor) -> torch.Tensor:
        self._keep(prefix, layer, kind, x)
        return x

    def _keep_mid(self, prefix: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        shape = self._here[prefix].shape
        self._keep(prefix, layer, "resid_mid", x, to_site=lambda t: t.reshape(*shape, t.shape[-1]))
        return x

    def _remember_stream(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        self._here[prefix].stream = x
        return x

    def _remember_z(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        self._here[prefix].z = x
        return x

    def _keep(
        self,
        prefix: str,
        layer: int | None,
        kind: str,
        x: torch.Tensor,
        to_site: Edit | None = None,
        to_grad: Edit | None = None,
    ) -> None:
        """Keep what was asked of x. `to_site` turns the tensor on the path into the site's layout, `to_grad` its
        gradient."""
        for site in self._reads.get((prefix, layer, kind), ()):
            whole = to_site(x) if to_site else x
            where = (
                self._window(prefix).locate(site.pos, whole.shape[token_axis(kind)], site)
                if site.pos is not None
                else slice(None)
            )
            if where is None:
                raise SiteError(f"{site} was not reached", fix="The position lies outside this forward")
            index = select_index(site, whole, where)
            partial = site.head is not None or site.expert is not None or site.pos is not None
            value = whole[index] if partial else whole
            if not self.grad:
                self.kept[str(site)] = Kept(value.clone() if partial else value)
                continue

            def pick(g: torch.Tensor, index: Any = index, partial: bool = partial) -> torch.Tensor:
                g = to_grad(g) if to_grad else (to_site(g) if to_site else g)
                return g[index] if partial else g

            self.kept[str(site)] = Kept(value, x, pick)

    def _edit(self, prefix: str, layer: int | None, kind: str, x: torch.Tensor) -> torch.Tensor:
        for intervention in self._edits.get((prefix, layer, kind), ()):
            site = intervention.site
            where = intervention.positions if intervention.positions is not None else site.pos
            where = self._window(prefix).locate(where, x.shape[token_axis(kind)], intervention)
            if where is None:
                continue
            self.fired.add(id(intervention))
            index = select_index(site, x, where)
            if all(isinstance(i, slice) and i == slice(None) for i in index):
                x = self._for_rows(intervention, x, None).apply(x)
                continue
            part = x[index]
            if intervention.whole:
                edited = self._for_rows(intervention, x, None).part(x, index).apply(part)
            else:
                rows = where[0] if isinstance(where, tuple) else None
                edited = self._for_rows(intervention, part, rows).apply(part)
            x = x.clone()
            x[index] = edited
        return x

    def _for_rows(self, intervention: Intervention, x: torch.Tensor, rows: torch.Tensor | None) -> Intervention:
        """Values that have one row a prompt, cut to the prompts of this batch; directions stay whole."""
        n, mine = self.window.n_prompts, self.window.rows
        changed: dict[str, Any] = {}
        for name in ("value", "source"):
            value = getattr(intervention, name)
            if name == "value" and intervention.op in ("project_out", "swap_subspace"):
                continue  # rows of directions, however many there are: they are not one a prompt
            if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                kept = range(len(value)) if mine is None else mine.tolist()
                if len({value[i].shape for i in kept}) > 1:
                    raise InterventionError(f"{intervention}: the values of these prompts have several shapes")
                value = torch.stack([value[i] for i in kept])
            elif (
                isinstance(value, torch.Tensor)
                and value.ndim == x.ndim
                and n is not None
                and value.shape[0] == n
                and mine is not None
            ):
                value = value[mine.to(value.device)]
            if (
                isinstance(value, torch.Tensor)
                and rows is not None
                and value.ndim == x.ndim
                and value.shape[0] not in (1, x.shape[0])
            ):
                value = value[rows.to(value.device)]
            if value is not getattr(intervention, name):
                changed[name] = value
        if not changed:
            return intervention
        return dataclasses.replace(intervention, **changed)

    # --- inside attention ---------------------------------------------------------------------------------------------

    def _attend(
        self,
        prefix: str,
        layer: int,
        part: Attention,
        cross: str,
        original: Any,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self.enabled:
            return original(module, q, k, v, mask, **kwargs)
        q = self._swapped(prefix, layer, f"{cross}q", q)
        k = self._swapped(prefix, layer, f"{cross}k", k)
        v = self._swapped(prefix, layer, f"{cross}v", v)
        edits_weights = any((prefix, layer, cross + kind) in self._edits for kind in ("scores", "pattern"))
        reads_weights = any((prefix, layer, cross + kind) in self._reads for kind in ("scores", "pattern"))
        if not edits_weights and not reads_weights:
            out, weights = original(module, q, k, v, mask, **kwargs)
        else:
            plain = original if part.method else eager_of(module)
            if plain is None:
                raise SiteError(
                    f"{type(module).__name__} has no plain attention function",
                    fix="Sites pattern and scores are not there",
                )
            out, weights = self._weights(prefix, layer, cross, original, plain, module, q, k, v, mask, kwargs)
        return self._pass(prefix, layer, f"{cross}z", out), weights

    def _weights(
        self,
        prefix: str,
        layer: int,
        cross: str,
        original: Any,
        plain: Any,
        module: nn.Module,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Attention with its scores and weights seen. Edits change the model's own output by what they change in the
        plain one, so weights that are only looked at, or put back as they were, leave it bit for bit."""
        attend = functools.partial(attend_plainly, plain, module, q, k, v, mask, **kwargs)
        edit_scores = None
        if self._wants(prefix, layer, f"{cross}scores"):
            edit_scores = functools.partial(self._pass, prefix, layer, f"{cross}scores")
        _, weights = attend(edit_scores=edit_scores)
        pattern = self._pass(prefix, layer, f"{cross}pattern", weights)
        if self.grad:
            return mix_values(pattern, v), weights
        out, own_weights = original(module, q, k, v, mask, **kwargs)
        rescored = (prefix, layer, f"{cross}scores") in self._edits
        if pattern is weights and not rescored:
            return out, own_weights
        before = attend()[1] if rescored else weights
        return out + (mix_values(pattern, v) - mix_values(before, v)), pattern

    def _swapped(self, prefix: str, layer: int, kind: str, x_BHTK: torch.Tensor) -> torch.Tensor:
        """q, k and v come as [B, H, T, K]; the site is [B, T, H, K]."""
        if not self._wants(prefix, layer, kind):
            return x_BHTK
        seen = x_BHTK.transpose(1, 2)
        edited = self._edit(prefix, layer, kind, seen)
        x_BHTK = x_BHTK if edited is seen else edited.transpose(1, 2)
        self._keep(prefix, layer, kind, x_BHTK, to_site=lambda t: t.transpose(1, 2))
        return x_BHTK

    def _heads(self, prefix: str, layer: int, part: Attention, kind: str, out: torch.Tensor) -> torch.Tensor:
        """Each head's own write. Reading computes the asked heads; writing changes the sum by what the head's write
        changes."""
        z = self._here[prefix].z
        if z is None:
            raise SiteError(f"{kind}.{layer} was not reached")
        z_BTHK = z.reshape(*self._here[prefix].shape, part.n_heads, part.d_value)
        weight_HKD = part.out_weight_HKD()

        def write_of(head: int) -> torch.Tensor:
            return z_BTHK[:, :, head] @ weight_HKD[head]

        edits = self._edits.get((prefix, layer, kind), ())
        touched: set[int] = set()
        for intervention in edits:
            head = intervention.site.head
            touched |= set(range(part.n_heads)) if head is None else {int(head)}
        whole = None
        if edits or any(site.head is None for site in self._reads.get((prefix, layer, kind), ())):
            whole = torch.stack([write_of(head) for head in range(part.n_heads)], dim=2)
        if edits and whole is not None:
            edited = self._edit(prefix, layer, kind, whole)
            change = sum((edited[:, :, h] - whole[:, :, h]).reshape(out.shape) for h in sorted(touched))
            whole, out = edited, out + change
        for site in self._reads.get((prefix, layer, kind), ()):
            where = (
                self._window(prefix).locate(site.pos, z_BTHK.shape[1], site) if site.pos is not None else slice(None)
            )
            if whole is not None:
                value = whole[select_index(site, whole, where)]
            else:
                single = write_of(int(site.head))  # type: ignore[arg-type]
                plain = Site("attn_out", layer)
                value = single[select_index(plain, single, where)]

            def pick(g: torch.Tensor, site: Site = site, where: Any = where) -> torch.Tensor:
                g = g.reshape(*z_BTHK.shape[:2], 1, -1).expand(-1, -1, part.n_heads, -1)
                return g[select_index(site, g, where)]

            self.kept[str(site)] = Kept(value, out, pick) if self.grad else Kept(value)
        return out

    def _logits(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.enabled:
            output.logits = self._pass("", None, "logits", output.logits)
        return output

    # --- ports --------------------------------------------------------------------------------------------------------

    def _look(self, name: str, port: Port) -> None:
        """Keep what passes a plain output, and no more: what most captures are, and forwards of small models feel."""
        kept, key = self.kept, port.key if isinstance(port.key, int) else 0

        def see(module: nn.Module, args: Any, output: Any) -> None:
            if self.enabled:
                kept[name] = Kept(output if isinstance(output, torch.Tensor) else output[key])

        self._undo.callback(port.module.register_forward_hook(see).remove)

    def _hook(self, prefix: str, port: Port, function: Edit) -> None:
        def through(x: torch.Tensor) -> torch.Tensor:
            if not port.flat:
                return function(x)
            shaped = x.reshape(*self._here[prefix].shape, x.shape[-1])
            after = function(shaped)
            return x if after is shaped and not self.grad else after.reshape(x.shape)

        if port.side == "in":

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if not self.enabled:
                    return None
                key = _argument(port, args, kwargs)
                x = args[key] if isinstance(key, int) else kwargs[key]
                after = through(x)
                if after is x:
                    return None
                if isinstance(key, int):
                    return (*args[:key], after, *args[key + 1 :]), kwargs
                return args, {**kwargs, key: after}

            self._undo.callback(port.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            return

        def after_(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.enabled:
                return None
            if isinstance(output, torch.Tensor):
                after = through(output)
                return None if after is output else after
            key = port.key if isinstance(port.key, int) else 0
            after = through(output[key])
            if after is output[key]:
                return None
            return type(output)((*output[:key], after, *output[key + 1 :]))

        self._undo.callback(port.module.register_forward_hook(after_).remove)


def _argument(port: Port, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where the port's tensor stands in this call (a model may pass it by position here and by name there)."""
    if isinstance(port.key, int) and port.key < len(args):
        return port.key
    if isinstance(port.key, str) and port.key in kwargs:
        return port.key
    if "hidden_states" in kwargs:
        return "hidden_states"
    if args:
        return 0
    raise SiteError(f"{port} was not given in this call")


def _attention_names(hf: nn.Module, modules: Iterable[nn.Module]) -> set[str]:
    """The attention implementations that these modules will ask for; the whole model's, where one has no config."""
    names: set[str] = set()
    for module in modules:
        name = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if not isinstance(name, str):
            return attention_names(hf)
        names.add(name)
    return names
