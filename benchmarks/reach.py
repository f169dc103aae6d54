"""Reaching inside a model: keep every resid/attn/mlp, keep attention patterns, patch one head, steer while generating.

Each job gives the same thing in each library, in one process, on one thread; results are compared before anything is
timed. Time is CPU time as a ratio to the bare transformers forward (or generation) of the same round. Peak memory is
that of a process of its own that loads the model and keeps everything once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import measure, models, pairs

PROMPTS, TOKENS, NEW_TOKENS, STEERED_PROMPTS = 8, 24, 8, 4
TASKS = ("keep", "pattern", "patch", "steer")
Kept = dict[str, torch.Tensor]


class Setting:
    """One model, its inputs, and where its parts are called what."""

    def __init__(self, name: str, *, alone: bool = False) -> None:
        self.name, self.alone = name, alone
        self.tokenizer: Any = None
        self.hf: Any = None
        self.hf = self.load()
        gpt2 = name == "gpt2"
        self.layers = self.hf.transformer.h if gpt2 else self.hf.model.layers
        self.attn, self.out = ("attn", "c_proj") if gpt2 else ("self_attn", "o_proj")
        config = self.hf.config
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.d_model, self.d_head = config.hidden_size, config.hidden_size // config.num_attention_heads
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(100, config.vocab_size - 100, (PROMPTS, TOKENS), generator=g)
        self.few = self.ids[:STEERED_PROMPTS]
        self.layer, self.head = self.n_layers // 2, 3
        self.donor = torch.randn(PROMPTS, TOKENS, self.d_head, generator=g)
        self.vector = 0.5 * torch.randn(self.d_model, generator=g)
        self.cut = slice(self.head * self.d_head, (self.head + 1) * self.d_head)
        self.generation = {
            "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0,
        }  # fmt: skip

    def load(self, eager: bool = False) -> Any:
        """A model of its own for a library that changes it; the same one where nothing else runs (`alone`)."""
        if self.alone and self.hf is not None and not eager:
            return self.hf
        if self.name == "gpt2":
            hf, self.tokenizer = models.gpt2_small(), pairs.word_tokenizer(50257)
        else:
            loaded = models.smollm2()
            hf, self.tokenizer = loaded.hf, loaded.tokenizer
        if eager:
            hf.set_attn_implementation("eager")
        return hf


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


class Bare:
    """transformers by itself: what it costs to run, or to give patterns out (with eager attention only)."""

    name = "bare transformers"
    skips: tuple[str, ...] = ("patch",)

    def __init__(self, s: Setting) -> None:
        self.s, self.hf, self.eager = s, s.hf, None

    def logits(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.hf(self.s.ids, use_cache=False).logits

    def keep(self) -> Kept:
        return {"logits": self.logits()}

    def pattern(self) -> Kept:
        if self.eager is None:
            self.eager = self.s.load(eager=True)
        with torch.inference_mode():
            out = self.eager(self.s.ids, use_cache=False, output_attentions=True)
        return {"logits": out.logits, **{f"pattern.{i}": x for i, x in enumerate(out.attentions)}}

    def steer(self) -> Kept:
        ones = torch.ones_like(self.s.few)
        return {"unsteered": self.hf.generate(self.s.few, attention_mask=ones, **self.s.generation)}


class Hooks:
    """Forward hooks written by hand, for this one model."""

    name = "plain hooks"
    skips: tuple[str, ...] = ("pattern",)

    def __init__(self, s: Setting) -> None:
        self.s, self.hf = s, s.hf

    def _hooked(self, hooks: Sequence[Any], call: Callable[[], Any]) -> Any:
        try:
            with torch.inference_mode():
                return call()
        finally:
            for hook in hooks:
                hook.remove()

    def keep(self) -> Kept:
        kept: Kept = {}

        def keeper(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: kept.__setitem__(name, _first(output))

        hooks: list[Any] = []
        for i, layer in enumerate(self.s.layers):
            hooks.append(getattr(layer, self.s.attn).register_forward_hook(keeper(f"attn_out.{i}")))
            hooks.append(layer.mlp.register_forward_hook(keeper(f"mlp_out.{i}")))
            hooks.append(layer.register_forward_hook(keeper(f"resid_post.{i}")))
        kept["logits"] = self._hooked(hooks, lambda: self.hf(self.s.ids, use_cache=False).logits)
        return kept

    def patch(self) -> Kept:
        def swap(_module: Any, args: Any) -> Any:
            x = args[0].clone()
            x[..., self.s.cut] = self.s.donor
            return (x, *args[1:])

        module = getattr(getattr(self.s.layers[self.s.layer], self.s.attn), self.s.out)
        hooks = [module.register_forward_pre_hook(swap)]
        return {"logits": self._hooked(hooks, lambda: self.hf(self.s.ids, use_cache=False).logits)}

    def steer(self) -> Kept:
        def push(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return output + self.s.vector
            return (output[0] + self.s.vector, *output[1:])

        hooks = [self.s.layers[self.s.layer].register_forward_hook(push)]
        ones = torch.ones_like(self.s.few)
        return {
            "ids": self._hooked(hooks, lambda: self.hf.generate(self.s.few, attention_mask=ones, **self.s.generation))
        }


class Headwater:
    name = "headwater"
    skips: tuple[str, ...] = ()

    def __init__(self, s: Setting) -> None:
        import headwater as hw

        self.s, self.hw, self.model = s, hw, hw.Model(s.hf)

    def _run(self, capture: Sequence[str], interventions: Sequence[Any] = ()) -> Kept:
        run = self.model.run(self.s.ids, capture=capture, interventions=interventions)
        return {"logits": run.logits, **{str(site): run[site] for site in run.captured}}

    def keep(self) -> Kept:
        return self._run(["resid_post.*", "attn_out.*", "mlp_out.*"])

    def pattern(self) -> Kept:
        return self._run(["pattern.*"])

    def patch(self) -> Kept:
        return self._run([], [self.hw.replace(f"z.{self.s.layer}.h{self.s.head}", self.s.donor)])

    def steer(self) -> Kept:
        new = self.model.generate(
            self.s.few, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            interventions=[self.hw.add(f"resid_post.{self.s.layer}", self.s.vector)],
        )  # fmt: skip
        return {"ids": torch.cat([self.s.few, torch.tensor(new)], dim=1)}


class NNsight:
    name = "nnsight"
    skips: tuple[str, ...] = ()

    def __init__(self, s: Setting) -> None:
        from nnsight import TransformersModel

        self.s, tokenizer = s, s.tokenizer
        self.model, self.eager = TransformersModel(s.hf, tokenizer=tokenizer), None
        self.tokenizer, self.Wrapper = tokenizer, TransformersModel

    def _layers(self, model: Any) -> Any:
        return model.transformer.h if self.s.name == "gpt2" else model.model.layers

    def keep(self) -> Kept:
        import nnsight

        lm, attn, kept, logits = self.model, self.s.attn, {}, None
        with torch.inference_mode(), lm.trace(self.s.ids, use_cache=False):
            kept = nnsight.save({})
            for i, layer in enumerate(self._layers(lm)):
                kept[f"attn_out.{i}"] = getattr(layer, attn).output[0]
                kept[f"mlp_out.{i}"] = layer.mlp.output
                kept[f"resid_post.{i}"] = layer.output
            logits = lm.output.logits.save()
        return {"logits": logits, **{name: _first(x) for name, x in kept.items()}}

    def pattern(self) -> Kept:
        import nnsight

        if self.eager is None:
            self.eager = self.Wrapper(self.s.load(eager=True), tokenizer=self.tokenizer)
        lm, attn, kept, logits = self.eager, self.s.attn, {}, None
        with torch.inference_mode(), lm.trace(self.s.ids, use_cache=False):
            kept = nnsight.save({})
            for i, layer in enumerate(self._layers(lm)):
                kept[f"pattern.{i}"] = getattr(layer, attn).output[1]
            logits = lm.output.logits.save()
        return {"logits": logits, **kept}

    def patch(self) -> Kept:
        lm, s, logits = self.model, self.s, None
        with torch.inference_mode(), lm.trace(s.ids, use_cache=False):
            module = getattr(getattr(self._layers(lm)[s.layer], s.attn), s.out)
            x = module.input.clone()
            x[..., s.cut] = s.donor
            module.input = x
            logits = lm.output.logits.save()
        return {"logits": logits}

    def steer(self) -> Kept:
        lm, s, ids = self.model, self.s, None
        layer = self._layers(lm)[s.layer]
        with (
            torch.inference_mode(),
            lm.generate(s.few, attention_mask=torch.ones_like(s.few), **s.generation) as tracer,
        ):
            for _ in tracer.iter[:NEW_TOKENS]:
                layer.output = layer.output + s.vector
            ids = tracer.result.save()
        return {"ids": ids}


class Bridge:
    name = "transformer-lens bridge"
    skips: tuple[str, ...] = ()
    resid, attn, mlp = "hook_resid_post", "hook_attn_out", "hook_mlp_out"

    def __init__(self, s: Setting) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.s = s
        folder = str(s.hf.config._name_or_path)
        self.model = TransformerBridge.boot_transformers(folder, hf_model=s.load(), tokenizer=s.tokenizer, device="cpu")

    def _cached(self, hooks: Sequence[str]) -> Kept:
        wanted = {f"blocks.{i}.{hook}" for i in range(self.s.n_layers) for hook in hooks}
        with torch.inference_mode():
            logits, cache = self.model.run_with_cache(self.s.ids, names_filter=lambda name: name in wanted)
        return {"logits": logits, **{name: cache[name] for name in wanted}}

    def keep(self) -> Kept:
        names = {self.resid: "resid_post", self.attn: "attn_out", self.mlp: "mlp_out"}
        kept = self._cached(list(names))
        out = {"logits": kept.pop("logits")}
        for name, value in kept.items():
            _, layer, hook = name.split(".", 2)
            out[f"{names[hook]}.{layer}"] = value
        return out

    def pattern(self) -> Kept:
        kept = self._cached(["attn.hook_pattern"])
        return {"logits": kept.pop("logits"), **{f"pattern.{name.split('.')[1]}": x for name, x in kept.items()}}

    def patch(self) -> Kept:
        def swap(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            z[:, :, self.s.head] = self.s.donor
            return z

        with torch.inference_mode():
            hooks = [(f"blocks.{self.s.layer}.attn.hook_z", swap)]
            return {"logits": self.model.run_with_hooks(self.s.ids, fwd_hooks=hooks)}

    def steer(self) -> Kept:
        def push(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return x + self.s.vector

        with torch.inference_mode(), self.model.hooks(fwd_hooks=[(f"blocks.{self.s.layer}.{self.resid}", push)]):
            ids = self.model.generate(
                self.s.few,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                return_type="tokens",
            )
        return {"ids": ids}


class Hooked(Bridge):
    name = "HookedTransformer"

    def __init__(self, s: Setting) -> None:
        self.s = s
        self.model = models.hooked_gpt2(s.hf)


LIBRARIES = {kind.name: kind for kind in (Bare, Hooks, Headwater, NNsight, Bridge, Hooked)}


def libraries(setting: str) -> list[str]:
    names = ["bare transformers", "plain hooks", "headwater"]
    if measure.installed("nnsight"):
        names.append("nnsight")
    if measure.installed("transformer_lens"):
        names.append("transformer-lens bridge" if setting == "smollm2" else "HookedTransformer")
    return names


def compare(task: str, results: dict[str, Kept]) -> dict[str, float]:
    """Largest difference of each library from headwater over everything that both give; token ids must be equal."""
    ours, found = results["headwater"], {}
    for name, theirs in results.items():
        both = sorted(set(ours) & set(theirs) - {"logits"})
        if task == "steer" and name != "bare transformers":
            same = torch.equal(ours["ids"], theirs["ids"])
            print(f"  {name}: {task}: generated ids equal" if same else f"  {name}: {task}: some generated ids DIFFER")
        elif both:
            worst = max(float((ours[k].float() - theirs[k].reshape(ours[k].shape).float()).abs().max()) for k in both)
            print(f"  {name}: {task}: {len(both)} tensors shared with headwater, largest difference {worst:.1e}")
        found[name] = (
            float((ours["logits"] - theirs["logits"]).abs().max()) if "logits" in ours and "logits" in theirs else 0.0
        )
    return found


def measure_setting(setting: str, title: str, rounds: int) -> None:
    s = Setting(setting)
    names = libraries(setting)
    held = {name: LIBRARIES[name](s) for name in names}
    times: dict[str, dict[str, measure.Spread]] = {}
    logits = {name: 0.0 for name in names}
    bare_logits = held["bare transformers"].logits()
    bare_seconds: dict[str, float] = {}
    for task in TASKS:
        doing = {name: getattr(lib, task) for name, lib in held.items() if task not in lib.skips}
        results = {name: job() for name, job in doing.items()}
        compare(task, results)
        if task == "keep":
            logits = {name: float((bare_logits - found["logits"]).abs().max()) for name, found in results.items()}
        results.clear()
        base = "bare transformers"
        if task in ("pattern", "patch"):
            base = "bare forward"
            doing = {base: held["bare transformers"].keep, **doing}
        spent = measure.interleaved(doing, rounds)
        times[task] = measure.ratios(spent, base)
        bare_seconds[task] = measure.Spread.of(spent[base]).median
    peaks = {name: measure.peak_mb("benchmarks.reach", f"{setting}:{name}") for name in names}
    rows = [
        [name, *(times[task][name].text() if name in times[task] else "" for task in TASKS), f"{logits[name]:.1e}",
         f"{peaks[name]:.0f}" if peaks[name] else ""]
        for name in names
    ]  # fmt: skip
    measure.table(
        f"{title}, {PROMPTS} prompts x {TOKENS} tokens: CPU time over bare transformers, median (min to max) of "
        f"{rounds} rounds. Bare: forward {bare_seconds['keep'] * 1000:.0f} ms, generation of {NEW_TOKENS} tokens for "
        f"{STEERED_PROMPTS} prompts {bare_seconds['steer'] * 1000:.0f} ms.",
        [
            "",
            f"keep {3 * s.n_layers} sites",
            "attention patterns",
            "patch one head",
            "steered generation",
            "logit difference",
            "peak MB",
        ],
        rows,
    )
    ours = "headwater"
    measure.bar(f"{setting}: keep", times["keep"][ours].median, 1.03)
    measure.bar(f"{setting}: patch", times["patch"][ours].median, 1.03)
    measure.bar(f"{setting}: steered generation", times["steer"][ours].median, 1.02)
    measure.bar(f"{setting}: logit difference", logits[ours], 0.0)


def main() -> None:
    arguments = measure.begin("Reaching inside a model", threads=1)
    if arguments.only:
        setting, name = arguments.only.split(":")
        LIBRARIES[name](Setting(setting, alone=True)).keep()
        measure.print_peak()
        return
    measure_setting("smollm2", "SmolLM2-135M", arguments.rounds or 6)
    measure_setting("gpt2", "GPT-2-small, random weights", arguments.rounds or 3)


if __name__ == "__main__":
    sys.exit(main())
