"""Every family, every kind of site, against transformers itself and a plain definition. Prints the exactness table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headwater.core.anatomy import linear_weight
from headwater.core.anatomy.trace import probe_inputs
from headwater.core.interventions import add, replace
from headwater.core.model import Model
from headwater.core.sites import Site
from tests.core.families import FAMILIES, MORE, build

# The table at this file's end is gathered from every test before it: in parallel runs one process takes a whole file.
TABLE: dict[str, dict[str, Any]] = {}


def output_of(result: Any) -> torch.Tensor:
    for name in ("logits", "logits_per_image"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    raise AssertionError("no output")


def plainly(hf: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        return output_of(hf(**inputs))


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE])
def family(request: pytest.FixtureRequest) -> tuple[str, Any, Model, dict[str, Any]]:
    hf = build(request.param)
    return request.param, hf, Model(hf), probe_inputs(hf, length=6)


def test_unhooked_output_is_bitwise_transformers(family: Any) -> None:
    name, hf, model, inputs = family
    before = plainly(hf, inputs)
    state = {key: value.clone() for key, value in hf.state_dict().items()}
    config = copy.deepcopy(hf.config.to_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())

    everything = [site for site in model.sites() if site.kind != "logits"]
    kept = model.run(inputs, capture=everything)
    difference = float((output_of(kept.output) - before).abs().max())
    TABLE.setdefault(name, {})["unhooked"] = float((output_of(model.run(inputs).output) - before).abs().max())
    TABLE[name]["all sites kept"] = difference
    TABLE[name]["sites"] = len(everything)

    assert torch.equal(output_of(model.run(inputs).output), before)
    assert difference == 0.0, "reading changed the output"
    # The user's model is left as it was: weights, config, hooks, methods.
    assert torch.equal(plainly(hf, inputs), before)
    assert all(torch.equal(value, state[key]) for key, value in hf.state_dict().items())
    assert hf.config.to_dict() == config
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()) == hooks
    assert not any("forward" in m.__dict__ or "_attn" in m.__dict__ for m in hf.modules())


def test_own_value_changes_nothing_and_another_value_does(family: Any) -> None:
    name, hf, model, inputs = family
    before = plainly(hf, inputs)
    sites = [site for site in model.sites() if site.kind != "logits"]
    kept = model.run(inputs, capture=sites)
    generator = torch.Generator().manual_seed(0)
    worst, silent = 0.0, []
    for site in sites:
        own = output_of(model.run(inputs, interventions=[replace(site, kept[site])]).output)
        worst = max(worst, float((own - before).abs().max()))
        noise = torch.randn(kept[site].shape, generator=generator, dtype=torch.float64).to(kept[site].dtype)
        changed = output_of(model.run(inputs, interventions=[add(site, noise)]).output)
        if torch.equal(changed, before):
            silent.append(str(site))
    TABLE.setdefault(name, {})["self-patch"] = worst
    TABLE[name]["silent writes"] = len(silent)
    assert worst == 0.0
    # A pooled head (ViT's class token, CLIP's end token) reads one position only; nothing may be silent all the same.
    assert not silent


@torch.no_grad()
def test_sites_hold_what_the_plain_definition_says(family: Any) -> None:
    name, _, model, inputs = family
    kept = model.run(inputs, capture=[site for site in model.sites() if site.kind != "logits"])
    worst = 0.0

    def same(value: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float = 1e-9) -> None:
        nonlocal worst
        error = float((value - wanted).abs().max())
        worst = max(worst, error)
        assert error < tolerance, f"{what}: {error}"

    for prefix, stack in model.anatomy.stacks.items():

        def at(kind: str, layer: int, prefix: str = prefix) -> torch.Tensor:
            return kept[Site(kind, layer, stack=prefix)]

        same(kept[Site("embed", stack=prefix)], at("resid_pre", 0), "embed")
        for block in stack.blocks:
            layer = block.index
            assert block.order != "opaque", f"{name} block {layer} was not understood"
            if layer + 1 < len(stack):
                same(at("resid_post", layer), at("resid_pre", layer + 1), "the stream is handed on")
            if block.order == "mixer":
                # Mamba adds in float32 whatever the weights are.
                same(at("resid_post", layer), at("resid_pre", layer) + at("mixer_out", layer), "mixer", 1e-5)
                continue
            total = at("resid_pre", layer) + at("attn_out", layer)
            if block.cross is not None:
                total = total + at("cross_attn_out", layer)
            if block.order == "sequential":
                same(at("resid_mid", layer), total, "resid_mid")
            if block.order in ("sequential", "parallel"):
                same(at("resid_post", layer), total + at("mlp_out", layer), "the stream is the sum of its writes")
            for cross, part in (("", block.attention), ("cross_", block.cross)):
                if part is None:
                    continue
                pattern, z = at(f"{cross}pattern", layer), at(f"{cross}z", layer)
                v = at(f"{cross}v", layer).repeat_interleave(part.n_heads // part.n_kv_heads, dim=2)
                # Many families take the softmax in float32.
                same(torch.einsum("bhts,bshk->bthk", pattern, v), z, "z is the pattern times v", 2e-6)
                if name != "gpt_oss":
                    same(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), "patterns sum to one", 1e-6)
                    same(at(f"{cross}scores", layer).softmax(-1), pattern, "pattern is the softmax of scores", 1e-6)
                head = at(f"{cross}head", layer)
                weight = linear_weight(part.out_proj).T.reshape(part.n_heads, part.d_value, -1)
                same(head, torch.einsum("bthk,hkd->bthd", z, weight), "head is z through its slice")
                bias = getattr(part.out_proj, "bias", None)
                rebuilt = head.sum(2) + (0 if bias is None else bias)
                post_normed = "norm" in part.write.port.name.rsplit(".", 1)[-1].lower()
                if not post_normed:
                    same(
                        rebuilt * part.write.scale, at(f"{cross}attn_out", layer), "attn_out is rebuilt from the heads"
                    )
            mlp = block.mlp
            if mlp is not None and mlp.down_proj is not None:
                out = at("neurons", layer) @ linear_weight(mlp.down_proj).T
                out = out if mlp.down_proj.bias is None else out + mlp.down_proj.bias
                if "norm" not in mlp.write.port.name.rsplit(".", 1)[-1].lower():
                    same(
                        out * mlp.write.scale,
                        at("mlp_out", layer),
                        "mlp_out is the neurons through the down-projection",
                    )
    TABLE.setdefault(name, {})["plain definition"] = worst


@torch.no_grad()
def test_a_write_to_resid_mid_reaches_resid_post(family: Any) -> None:
    name, _, model, inputs = family
    done = 0.0
    for prefix, stack in model.anatomy.stacks.items():
        for block in stack.blocks:
            mid, post, mlp_out = (Site(k, block.index, stack=prefix) for k in ("resid_mid", "resid_post", "mlp_out"))
            if mid not in model.sites() or block.order == "post_norm":
                continue
            base = model.run(inputs, capture=[mid, post, mlp_out])
            noise = torch.randn(base[mid].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            run = model.run(inputs, capture=[mid, post, mlp_out], interventions=[add(mid, noise)])
            assert float((run[mid] - base[mid] - noise).abs().max()) < 1e-9
            error = float((run[post] - (base[mid] + noise + run[mlp_out])).abs().max())
            assert error < 1e-9
            assert not torch.equal(run[mlp_out], base[mlp_out]), "the MLP did not see the write"
            done = max(done, error)
    TABLE.setdefault(name, {})["resid_mid"] = done


def test_gradients_equal_those_of_a_differentiable_intervention(family: Any) -> None:
    """Two ways to the same number: the gradient at a captured site, and that of zeros that are added there."""
    name, hf, model, inputs = family
    if name in ("vit", "clip"):
        pytest.skip("compared on models that give logits for tokens")
    asked = {n: p.requires_grad for n, p in hf.named_parameters()}
    sites = [s for s in model.sites() if s.layer == 1 and s.stack == model.anatomy.main.prefix]
    run = model.run(inputs, capture=sites, grad=True)
    gradients = run.grads(run.logits[..., -1, 7].sum())
    assert {n: p.requires_grad for n, p in hf.named_parameters()} == asked, "freezing was not undone"
    largest = 0.0
    for site in sites:
        nothing = torch.zeros_like(run[site]).requires_grad_(True)
        changed = model.run(inputs, interventions=[add(site, nothing)], grad=True)
        (wanted,) = torch.autograd.grad(changed.logits[..., -1, 7].sum(), nothing)
        error = float((gradients[str(site)] - wanted).abs().max())
        largest = max(largest, float(wanted.abs().max()))
        # Scores of masked keys have no finite meaning, and some families compute norms in float32.
        assert error < 1e-6, f"{site}: {error}"
    assert largest > 1e-3
    TABLE.setdefault(name, {})["gradient"] = largest


def test_a_gradient_is_the_limit_of_differences() -> None:
    model = Model(build("gpt2"))
    inputs = probe_inputs(model.hf, length=6)
    sites = model.sites("*.1") + model.sites("embed")
    run = model.run(inputs, capture=sites, grad=True)
    gradients = run.grads(run.logits[0, -1, 7])
    generator = torch.Generator().manual_seed(2)
    for site in sites:
        direction = torch.randn(run[site].shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        plus, minus = (
            model.run(inputs, interventions=[add(site, direction, scale=sign * step)]).logits[0, -1, 7]
            for sign in (1, -1)
        )
        assert float(plus - minus) / (2 * step) == pytest.approx(
            float((gradients[str(site)] * direction).sum()), rel=1e-5, abs=1e-8
        )


def test_table(summary_table: Callable[[str], None]) -> None:
    """Prints what was measured, after the results."""
    names = [name for name in [*FAMILIES, *MORE] if name in TABLE]
    assert len([name for name in names if name in FAMILIES]) >= 24
    columns = ["sites", "unhooked", "all sites kept", "self-patch", "silent writes", "plain definition", "resid_mid"]
    lines = [f"{'family':18}" + "".join(f"{column:>18}" for column in columns)]
    for name in names:
        lines.append(f"{name:18}" + "".join(f"{TABLE[name].get(column, float('nan')):>18.3g}" for column in columns))
    summary_table("Exactness over families (largest absolute difference, float64)\n" + "\n".join(lines))
