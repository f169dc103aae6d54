"""What a call costs beyond the model's own work: twelve layers so small that nearly all of the time is bookkeeping.

Milliseconds of CPU time a call, over the bare forward of the same round, on one thread.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks import measure, models

LAYERS, REPEATS = 12, 10


def hand_hooks(hf: Any, ids: torch.Tensor) -> measure.Job:
    """Forward hooks written by hand on the same 36 modules: what hooks themselves cost."""

    def job() -> object:
        kept: dict[str, torch.Tensor] = {}

        def keeper(name: str) -> Any:
            return lambda _m, _a, out: kept.__setitem__(name, out if isinstance(out, torch.Tensor) else out[0])

        hooks = []
        for i, layer in enumerate(hf.model.layers):
            hooks += [
                layer.self_attn.register_forward_hook(keeper(f"attn_out.{i}")),
                layer.mlp.register_forward_hook(keeper(f"mlp_out.{i}")),
                layer.register_forward_hook(keeper(f"resid_post.{i}")),
            ]
        with torch.inference_mode():
            hf(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return kept

    return job


def nnsight_jobs(hf: Any, ids: torch.Tensor, donor: torch.Tensor) -> dict[str, measure.Job]:
    import nnsight

    lm = nnsight.NNsight(hf)

    def keep() -> object:
        kept: Any = None
        with torch.inference_mode(), lm.trace(ids, use_cache=False):
            kept = nnsight.save({})
            for i, layer in enumerate(lm.model.layers):
                kept[f"attn_out.{i}"] = layer.self_attn.output[0]
                kept[f"mlp_out.{i}"] = layer.mlp.output
                kept[f"resid_post.{i}"] = layer.output
        return kept

    def patch() -> object:
        logits = None
        with torch.inference_mode(), lm.trace(ids, use_cache=False):
            x = lm.model.layers[5].self_attn.o_proj.input.clone()
            x[..., 8:16] = donor
            lm.model.layers[5].self_attn.o_proj.input = x
            logits = lm.output.logits.save()
        return logits

    return {"nnsight: keep 36 sites": keep, "nnsight: patch one head": patch}


def bridge_jobs(ids: torch.Tensor, donor: torch.Tensor) -> dict[str, measure.Job]:
    from transformer_lens.model_bridge import TransformerBridge

    hf = models.tiny_llama(LAYERS)
    bridge = TransformerBridge.boot_transformers(
        models.smollm2_folder(), hf_model=hf, tokenizer=models.smollm2().tokenizer, device="cpu"
    )
    names = {f"blocks.{i}.{h}" for i in range(LAYERS) for h in ("hook_resid_post", "hook_attn_out", "hook_mlp_out")}
    inside = {f"blocks.{i}.attn.hook_{h}" for i in range(LAYERS) for h in ("q", "k", "v", "pattern", "z")}

    def swap(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, :, 1] = donor
        return z

    def cached(wanted: set[str]) -> measure.Job:
        def job() -> object:
            with torch.inference_mode():
                return bridge.run_with_cache(ids, names_filter=lambda name: name in wanted)

        return job

    def patch() -> object:
        with torch.inference_mode():
            return bridge.run_with_hooks(ids, fwd_hooks=[("blocks.5.attn.hook_z", swap)])

    return {
        "bridge: bare": lambda: cached(set())(),
        "bridge: keep 36 sites": cached(names),
        "bridge: patch one head": patch,
        "bridge: q, k, v, pattern, z of all layers": cached(inside),
    }


def main() -> None:
    arguments = measure.begin("Fixed cost of a call", threads=1)
    rounds = arguments.rounds or 15
    import headwater as hw

    hf = models.tiny_llama(LAYERS)
    model = hw.Model(hf)
    ids = torch.randint(0, 64, (1, 8))
    donor = torch.randn(1, 8, 8)
    sites = ["resid_post.*", "attn_out.*", "mlp_out.*"]
    inside = [f"{kind}.*" for kind in ("q", "k", "v", "pattern", "z")]

    def bare() -> object:
        with torch.inference_mode():
            return hf(ids, use_cache=False)

    jobs: dict[str, measure.Job] = {
        "bare": bare,
        "plain hooks: keep 36 sites": hand_hooks(hf, ids),
        "headwater: nothing asked": lambda: model.run(ids),
        "headwater: keep 36 sites": lambda: model.run(ids, capture=sites),
        "headwater: patch one head": lambda: model.run(ids, interventions=[hw.replace("z.5.h1", donor)]),
        "headwater: q, k, v, pattern, z of all layers": lambda: model.run(ids, capture=inside),
    }
    plain, ours = hand_hooks(hf, ids)(), model.run(ids, capture=sites)
    worst = max(float((ours[name] - x).abs().max()) for name, x in plain.items())  # type: ignore[attr-defined]
    print(f"  36 sites of headwater and of plain hooks: largest difference {worst:g}")
    if measure.installed("nnsight"):
        jobs |= nnsight_jobs(hf, ids, donor)
    if measure.installed("transformer_lens"):
        jobs |= bridge_jobs(ids, donor)

    spent = measure.interleaved(jobs, rounds, repeats=REPEATS, warm=3)
    over = {
        name: measure.Spread.of([1000 * (a - b) for a, b in zip(times, spent["bare"], strict=True)])
        for name, times in spent.items()
    }
    # What contention adds is never negative, so the fastest rounds say best what the work itself costs.
    least = {name: 1000 * (min(times) - min(spent["bare"])) for name, times in spent.items()}
    alone = measure.Spread.of([1000 * t for t in spent["bare"]])
    measure.table(
        f"{LAYERS} layers, d_model 32, one prompt of 8 tokens: CPU ms a call over bare ({alone.text()} ms), "
        f"median (min to max) of {rounds} rounds of {REPEATS} calls",
        ["", "ms over bare", "fastest round over bare's fastest"],
        [[name, x.text(), f"{least[name]:.2f}"] for name, x in over.items() if name != "bare"],
    )
    measure.bar("headwater: hooks on 36 sites, ms (median)", over["headwater: keep 36 sites"].median, 1.0)
    measure.bar("headwater: hooks on 36 sites, ms (fastest rounds)", least["headwater: keep 36 sites"], 1.0)


if __name__ == "__main__":
    sys.exit(main())
