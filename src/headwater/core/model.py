"""Model: a transformers model that is read and changed at its sites, and otherwise left exactly as it is."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import defaultdict
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch

from headwater.core.addresses import resolved, sites_of
from headwater.core.anatomy import Anatomy, device_of, evaluating, find_anatomy
from headwater.core.anatomy.check import check_sites
from headwater.core.errors import InterventionError, ModelError, SiteError
from headwater.core.interventions import Intervention
from headwater.core.places import Window, refuse_padded
from headwater.core.run import Run, in_order
from headwater.core.session import Kept, Session, Stopped
from headwater.core.sites import Site

Inputs = str | Sequence[Any] | torch.Tensor | dict[str, Any]
Logits = Literal["all", "last", "none"]
_MAX_TOKENS_A_BATCH = 8192


class Model:
    """A loaded transformers model with its tokenizer and its anatomy.

    With no capture and no intervention asked for, outputs are the model's own, bit for bit. The model object is never
    changed: hooks are on only while a run or an `intervene` block lasts, and no config is touched.
    """

    def __init__(self, hf: Any, tokenizer: Any = None, *, name: str | None = None, processor: Any = None) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name or getattr(hf.config, "_name_or_path", "") or type(hf).__name__
        self.anatomy: Anatomy = find_anatomy(hf)
        self._active: list[Session] = []
        self._lock = threading.RLock()
        self._fingerprint: tuple[Any, str] | None = None
        self._resolved: dict[tuple[Site, int], tuple[Site, ...]] = {}
        self._takes = set(inspect.signature(hf.forward).parameters)
        check_sites(self)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return device_of(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.hf.parameters() if p.is_floating_point())

    @property
    def n_layers(self) -> int:
        return len(self.anatomy.main)

    @property
    def d_model(self) -> int:
        return self.anatomy.main.d_model

    def _attention_fact(self, name: str) -> int:
        part = next((b.attention for b in self.anatomy.main.blocks if b.attention is not None), None)
        if part is None:
            raise ModelError(f"{self.name} has no attention, so it has no {name}")
        return getattr(part, name)

    @property
    def n_heads(self) -> int:
        return self._attention_fact("n_heads")

    @property
    def n_kv_heads(self) -> int:
        return self._attention_fact("n_kv_heads")

    @property
    def d_head(self) -> int:
        return self._attention_fact("d_head")

    @property
    def d_vocab(self) -> int:
        return int(getattr(getattr(self.hf.config, "text_config", self.hf.config), "vocab_size", 0))

    @property
    def max_length(self) -> int | None:
        """Longest prompt, in tokens; None where the model has no such bound."""
        config = getattr(self.hf.config, "text_config", self.hf.config)
        for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
            if isinstance(value := getattr(config, name, None), int):
                return value
        return None

    @property
    def fingerprint(self) -> str:
        """A short hash of config and weights: what a stored number was measured on."""
        from headwater.core.fingerprint import fingerprint

        # Reading every weight takes about a second at 135M; autograd's version counter says whether one was changed in
        # place.
        state = [p for p in (*self.hf.parameters(), *self.hf.buffers()) if not p.is_inference()]
        key = tuple((p.data_ptr(), p._version) for p in state)
        if self._fingerprint is None or self._fingerprint[0] != key:
            self._fingerprint = (key, fingerprint(self.hf))
        return self._fingerprint[1]

    def __repr__(self) -> str:
        size = f"{self.n_layers} layers, d_model {self.d_model}"
        return f"Model({self.name!r}, {self.anatomy.family}, {size}, {self.dtype}, {self.device})"

    # --- sites --------------------------------------------------------------------------------------------------------

    def sites(self, pattern: str | Site = "*") -> list[Site]:
        """The whole sites (no head, no position) that this model has, or those of them that a pattern means."""
        return sites_of(self.anatomy, pattern)

    def resolve(self, pattern: str | Site) -> list[Site]:
        """The concrete sites that a site or pattern means in this model, with head, expert and position kept. Raises if
        there is none."""
        wanted = Site.parse(pattern)
        # What a pattern means changes only while the model is checked at load, and sites are refused.
        key = (wanted, len(self.anatomy.refused))
        if key not in self._resolved:
            self._resolved[key] = tuple(resolved(self.anatomy, wanted, self.name))
        return list(self._resolved[key])

    # --- inputs -------------------------------------------------------------------------------------------------------

    def tokens(self, prompts: Any) -> list[torch.Tensor]:
        """Token ids, one tensor [T] a prompt: the tokenizer's own (nothing is prepended that it does not prepend
        itself)."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, torch.Tensor):
            rows = prompts[None] if prompts.ndim == 1 else prompts
            return self._checked([row.to(self.device) for row in rows])
        prompts = list(prompts)
        if not prompts:
            raise ModelError("no prompts were given", wanted="a string, strings, token ids or a dict of inputs")
        if isinstance(prompts[0], int):
            prompts = [prompts]
        if isinstance(prompts[0], str):
            if self.tokenizer is None:
                raise ModelError(
                    f"{self.name} has no tokenizer", got="text", fix="Pass token ids, or load with tokenizer="
                )
            prompts = self.tokenizer(prompts)["input_ids"]
        return self._checked([torch.as_tensor(ids, dtype=torch.long, device=self.device) for ids in prompts])

    def _checked(self, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        for number, ids in enumerate(tokens):
            if ids.numel() == 0:
                raise ModelError(f"prompt {number} has no tokens")
            if self.max_length is not None and len(ids) > self.max_length:
                raise ModelError(
                    f"prompt {number} is longer than the context of {self.name}",
                    got=f"{len(ids)} tokens",
                    wanted=f"at most {self.max_length}",
                    fix="Shorten it",
                )
        return tokens

    # --- running ------------------------------------------------------------------------------------------------------

    def run(
        self,
        inputs: Inputs,
        *,
        capture: str | Site | Sequence[str | Site] = (),
        logits: Logits = "all",
        grad: bool = False,
        interventions: Sequence[Intervention] = (),
        positions: dict[str, torch.Tensor] | None = None,
        stop_after: str | Site | None = None,
        batch_size: int | None = None,
    ) -> Run:
        """Run prompts and keep what is asked for.

        inputs: text, texts, token ids, or a dict of the model's own inputs (then as one batch, untouched). capture:
        sites or patterns.
        logits: "all" positions, the "last" one only, or "none" (then the forward ends at the last layer that is
        needed). grad: record for autograd, with weights frozen and the stream entering the first block as the leaf;
        otherwise everything runs in inference mode.
        positions: named positions, one index a prompt. stop_after: a site after whose layer the forward ends. Prompts
        of several lengths run in groups of equal length, so nothing is padded; results come back in the given order.

        Raises SiteError for a site that this model lacks, or an intervention that never fired.
        """
        wanted = [capture] if isinstance(capture, str | Site) else list(capture)
        sites = list(dict.fromkeys(site for pattern in wanted for site in self.resolve(pattern)))
        if (
            grad
            and any(site.kind in ("head", "cross_head") for site in sites)
            and any(i.site.kind == "head" for i in interventions)
        ):
            raise InterventionError("gradients of heads that are also changed are not defined", fix="Capture z instead")
        if logits not in ("all", "last", "none"):
            raise ModelError("unknown choice of logits", got=repr(logits), wanted='"all", "last" or "none"')
        active, around = self._around()
        concrete = [*active, *self._concrete(interventions)]
        stop = self._stop(sites, stop_after, logits)
        if isinstance(inputs, dict):
            refuse_padded(inputs, [*sites, *concrete], logits)
        batches = self._batches(inputs, batch_size)
        n_prompts = sum(len(rows) for rows, _, _ in batches)
        named = around | {name: torch.as_tensor(index) for name, index in (positions or {}).items()}
        for name, index in named.items():
            if len(index) != n_prompts:
                raise InterventionError(
                    f"named position {name!r} does not fit the prompts", got=f"{len(index)} indices", wanted=n_prompts
                )

        parts: list[tuple[list[int], dict[str, Kept], Any, Any]] = []
        fired: set[int] = set()
        with self._lock, self._suspended():
            for rows, arguments, length in batches:
                window = Window(torch.tensor(rows), n_prompts, length, named=named)
                session = Session(self.hf, self.anatomy, sites, concrete, window, grad=grad, leaf=grad, stop=stop)
                output = self._forward(session, arguments, logits, grad)
                fired |= session.fired
                parts.append((rows, session.kept, self._logits_of(output, logits), output))
        self._check_fired(concrete, fired, sites, parts)
        return self._merge(inputs, batches, parts, sites, logits)

    def _concrete(self, interventions: Sequence[Intervention]) -> list[Intervention]:
        return [i.at(site) for i in interventions for site in self.resolve(i.site)]

    def _forward(self, session: Session, arguments: dict[str, Any], logits: Logits, grad: bool) -> Any:
        mode = _frozen(self.hf) if grad else torch.inference_mode()
        try:
            with mode, evaluating(self.hf), session.installed():
                if logits == "last" and "logits_to_keep" in self._takes:
                    arguments = {**arguments, "logits_to_keep": 1}
                if "use_cache" in self._takes and "use_cache" not in arguments:
                    arguments = {**arguments, "use_cache": False}
                return self.hf(**arguments)
        except Stopped:
            return None

    def _logits_of(self, output: Any, logits: Logits) -> torch.Tensor | None:
        found = getattr(output, "logits", None) if output is not None and logits != "none" else None
        if not isinstance(found, torch.Tensor):
            return None
        return found[:, -1] if logits == "last" and found.ndim == 3 else found

    def _stop(self, sites: list[Site], stop_after: str | Site | None, logits: Logits) -> tuple[str, int] | None:
        main = self.anatomy.main.prefix
        if stop_after is not None:
            site = self.resolve(stop_after)[-1]
            return (site.stack, int(site.layer or 0))
        if logits != "none" or any(site.kind == "logits" or site.stack != main for site in sites):
            return None
        if len(self.anatomy.stacks) > 1 and not sites:
            return None
        # Nothing was asked for: the whole stack runs, but the unembedding does not.
        return (main, max((int(s.layer or 0) for s in sites), default=len(self.anatomy.main) - 1))

    def _batches(self, inputs: Inputs, batch_size: int | None) -> list[tuple[list[int], dict[str, Any], int | None]]:
        """(rows, keyword arguments of the forward, prompt length) of each batch; batches hold prompts of one length."""
        if isinstance(inputs, dict):
            main = inputs.get("decoder_input_ids", inputs.get(getattr(self.hf, "main_input_name", "input_ids")))
            main = next((x for x in inputs.values() if isinstance(x, torch.Tensor)), None) if main is None else main
            if main is None:
                raise ModelError("the inputs hold no tensor", got=list(inputs))
            moved = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            return [(list(range(len(main))), moved, None)]
        if self.hf.config.is_encoder_decoder or getattr(self.hf, "main_input_name", "input_ids") != "input_ids":
            raise ModelError(
                f"{self.name} takes more than a prompt",
                fix="Pass a dict of the model's own inputs (such as input_ids and decoder_input_ids)",
            )
        tokens = self.tokens(inputs)
        lengths: dict[int, list[int]] = defaultdict(list)
        for row, ids in enumerate(tokens):
            lengths[len(ids)].append(row)
        batches: list[tuple[list[int], dict[str, Any], int | None]] = []
        for length, rows in lengths.items():
            size = batch_size or max(1, _MAX_TOKENS_A_BATCH // length)
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                batches.append((some, {"input_ids": torch.stack([tokens[row] for row in some])}, length))
        return batches

    def _check_fired(
        self, interventions: list[Intervention], fired: set[int], sites: list[Site], parts: list[Any]
    ) -> None:
        for intervention in interventions:
            if id(intervention) not in fired:
                raise SiteError(
                    f"{intervention} never fired", fix="The forward did not reach its site, or none of its positions"
                )
        for site in sites:
            if not all(str(site) in kept for _, kept, _, _ in parts):
                raise SiteError(f"{site} was captured nowhere", fix="The forward did not reach it")

    def _merge(self, inputs: Inputs, batches: list[Any], parts: list[Any], sites: list[Site], logits: Logits) -> Run:
        tokens: list[Any] = [None] * sum(len(rows) for rows, _, _ in batches)
        for rows, arguments, _ in batches:
            ids = arguments.get("decoder_input_ids", arguments.get("input_ids"))
            for place, row in enumerate(rows):
                tokens[row] = ids[place] if isinstance(ids, torch.Tensor) else None
        names = [str(site) for site in sites]
        run = Run(
            tokens,
            captured=sites,
            output=parts[0][3] if len(parts) == 1 else None,
            _values={name: in_order([(rows, kept[name].value) for rows, kept, _, _ in parts]) for name in names},
            _kept=[kept for _, kept, _, _ in parts],
        )
        if all(found is not None for _, _, found, _ in parts):
            run.logits = in_order([(rows, found) for rows, _, found, _ in parts])
        return run

    # --- intervening --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def intervene(
        self, *interventions: Intervention, positions: dict[str, torch.Tensor] | None = None
    ) -> Generator[Model]:
        """Inside this block the interventions hold, for `run`, `generate` and calls of the model itself. Blocks nest;
        the inner one adds."""
        outer, around = self._around()
        concrete = [*outer, *self._concrete(interventions)]
        named = around | {name: torch.as_tensor(index) for name, index in (positions or {}).items()}
        window = Window(open_ended=True, named=named)
        session = Session(self.hf, self.anatomy, [], concrete, window)
        with self._lock, self._suspended(), session.installed():
            self._active.append(session)
            try:
                yield self
            finally:
                self._active.pop()
        if session.forwards:
            self._check_fired(concrete, session.fired, [], [])

    @contextlib.contextmanager
    def held(self) -> Generator[Model]:
        """Runs of other threads wait while this block lasts: for work that changes the weights themselves."""
        with self._lock:
            yield self

    def _around(self) -> tuple[list[Intervention], dict[str, torch.Tensor]]:
        """Interventions and named positions of the `intervene` blocks around this call; another thread's are waited
        for."""
        with self._lock:
            return (self._active[-1].interventions, self._active[-1].window.named) if self._active else ([], {})

    @contextlib.contextmanager
    def _suspended(self) -> Generator[None]:
        """Hooks of the enclosing `intervene` blocks rest: what runs inside carries their interventions itself."""
        before = [session.enabled for session in self._active]
        for session in self._active:
            session.enabled = False
        try:
            yield
        finally:
            for session, enabled in zip(self._active, before, strict=False):
                session.enabled = enabled

    def generate(
        self,
        prompts: str | Sequence[Any] | torch.Tensor,
        *,
        max_new_tokens: int = 20,
        interventions: Sequence[Intervention] = (),
        positions: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The continuation of a prompt (a list of them for several), greedy unless told otherwise (`do_sample=True`,
        `temperature=` ...).

        Positions of interventions are absolute and hold under the key/value cache: `@3` is the prompt's fourth token in
        every step. Returns text, or lists of token ids where there is no tokenizer.
        """
        from transformers import GenerationConfig

        tokens = self.tokens(prompts)
        single = isinstance(prompts, str) or (isinstance(prompts, torch.Tensor) and prompts.ndim == 1)
        own = self.hf.generation_config
        pad = own.pad_token_id if own.pad_token_id is not None else (own.eos_token_id or 0)
        settings = {
            "do_sample": False,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": own.eos_token_id,
            "bos_token_id": own.bos_token_id,
            "pad_token_id": pad[0] if isinstance(pad, list) else pad,
        }
        known = GenerationConfig()
        config = GenerationConfig(**settings | {k: v for k, v in kwargs.items() if hasattr(known, k)})
        if config.return_dict_in_generate or (config.num_return_sequences or 1) > 1:
            raise ModelError(
                "generate gives one continuation a prompt",
                got="num_return_sequences or return_dict_in_generate",
                fix="Call model.hf.generate inside `with model.intervene(...)`",
            )
        # What is no setting (a streamer, logits processors) goes to transformers, which refuses what it does not know.
        extra = {k: v for k, v in kwargs.items() if not hasattr(known, k)}
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        outer, around = self._around()
        concrete = [*outer, *self._concrete(interventions)]
        named = around | {k: torch.as_tensor(v) for k, v in (positions or {}).items()}
        out: list[Any] = [None] * len(tokens)
        fired: set[int] = set()
        lengths: dict[int, list[int]] = defaultdict(list)
        for row, ids in enumerate(tokens):
            lengths[len(ids)].append(row)
        for length, rows in lengths.items():
            ids = torch.stack([tokens[row] for row in rows])
            window = Window(torch.tensor(rows), len(tokens), length, open_ended=True, named=named)
            session = Session(self.hf, self.anatomy, [], concrete, window)
            with self._lock, self._suspended(), torch.inference_mode(), evaluating(self.hf), session.installed():
                done = self.hf.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **extra)
            fired |= session.fired
            for row, sequence in zip(rows, done, strict=True):
                new = sequence[length:]
                # After its end a prompt is only filled up, while others of its length go on.
                over = [i for i, token in enumerate(new.tolist()) if token in ends]
                new = new[: over[0] + 1] if over else new
                out[row] = (
                    new.tolist() if self.tokenizer is None else self.tokenizer.decode(new, skip_special_tokens=True)
                )
        self._check_fired(concrete, fired, [], [])
        for session in self._active:
            session.fired |= fired
        return out[0] if single else out


@contextlib.contextmanager
def _frozen(hf: Any) -> Generator[None]:
    """No gradient of a weight: they are not asked for, and would cost as much again."""
    asked = [p for p in hf.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
