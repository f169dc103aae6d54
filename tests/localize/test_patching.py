"""Patch sweeps equal single interventions, one at a time, through model.run."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError, SiteError
from headwater.localize.engine.passes import Engine, Scored, make_batches
from headwater.localize.engine.sites import read_spec
from headwater.localize.engine.sweep import Sweep, Target
from headwater.localize.graph import Graph
from localize_families import LAYERS, LAYOUTS, H, bound, make, pairs

GRAPH = Graph(n_layers=2, n_heads=4, n_kv_heads=2)
KINDS = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head"]


def all_targets(kinds: list[str], positions: list[str | None]) -> list[Target]:
    targets = []
    for position in positions:
        for layer in range(LAYERS):
            targets += [Target(kind=k, layer=layer, position=position) for k in kinds]  # type: ignore[arg-type]
            targets += [Target(kind="head", layer=layer, head=h, position=position) for h in range(H)]
    return targets


def plain_patch(model: Any, target: Target, base: Any, other: Any, group: Any) -> torch.Tensor:
    """One full run with one site resampled from the other run."""
    site = f"{target.kind}.{target.layer}" + ("" if target.head is None else f".h{target.head}")
    source = other
    position = None
    if target.position in group.positions:
        position = group.positions[target.position]
    elif target.position is not None:
        position = int(target.position)
    value = source[site]
    if isinstance(position, int):
        value, site = value[:, position], f"{site}@{position}"
        run = model.run(base, interventions=[hw.resample(site, value)], logits="last")
    elif position is None:
        run = model.run(base, interventions=[hw.resample(site, value)], logits="last")
    else:
        value = value[torch.arange(len(value)), position]
        run = model.run(
            base, interventions=[hw.resample(f"{site}@HERE", value)], positions={"HERE": position}, logits="last"
        )
    return metric("logit_diff")(run.logits, group.answers, group.foils)


FAMILIES = ["llama", "gpt2", "neox", "phi", "gemma2", "qwen3", "olmo2", "granite", "opt", "mixtral"]
CASES = [(name, "denoise", True) for name in FAMILIES]
CASES += [(name, "noise", True) for name in ("llama", "neox", "gemma2")]
CASES += [(name, "noise", False) for name in ("gpt2", "olmo2")]


@pytest.mark.parametrize(("name", "direction", "reuse"), CASES)
def test_sweeps_equal_single_interventions(name: str, direction: str, reuse: bool) -> None:
    model = make(name)
    group = pairs(3, 6, 2)
    group.positions["S"] = torch.tensor([3, 2, 4])
    base, other = (group.corrupt, group.clean) if direction == "denoise" else (group.clean, group.corrupt)
    engine = Engine(model)
    (batch,) = make_batches(bound(group), 1000)
    assert batch.prefix == 2
    kinds = [k for k in KINDS[:-1] if k != "resid_mid" or not LAYOUTS[name].parallel]
    targets = all_targets(kinds, [None, "-1", "-3", "0", "S"])
    with engine.open(), ExitStack() as stack:
        batch = Scored.named("logit_diff").narrowed(stack, engine, batch)
        sweep = Sweep(engine, Scored.named("logit_diff"), batch, base_is_clean=direction == "noise", reuse=reuse)
        found = sweep.values(targets, 40)
    moved, source = 0, model.run(other, capture=[f"{kind}.*" for kind in kinds] + ["head.*.h*"])
    for target in targets:
        expected = plain_patch(model, target, base, source, group)
        torch.testing.assert_close(
            found[target], expected, rtol=1e-9, atol=1e-9, msg=lambda m, t=target: f"{t.site}: {m}"
        )
        moved += int(not torch.allclose(expected, sweep.base_value))
    assert moved > len(targets) // 3
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_every_family_sweeps() -> None:
    for name in LAYOUTS:
        engine = Engine(make(name))
        (batch,) = make_batches(bound(pairs(2, 5, 2)), 1000)
        with engine.open(), ExitStack() as stack:
            batch = Scored.named("logit_diff").narrowed(stack, engine, batch)
            sweep = Sweep(engine, Scored.named("logit_diff"), batch, base_is_clean=False, reuse=True)
            found = sweep.values([Target(kind="resid_pre", layer=0), Target(kind="resid_post", layer=LAYERS - 1)], 64)
        for value in found.values():
            torch.testing.assert_close(value, sweep.other_value, rtol=1e-9, atol=1e-9)


def test_a_table_of_effects(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=12, seed=0)
    result = hw.localize.patch(tiny_model, ioi, sites=["head", "resid_pre@*", "mlp_out@END", "resid_post.2"])
    table = result.to_frame()
    assert table.columns == ["site", "kind", "layer", "head", "position", "effect", "lo", "hi", "n", "direction"]
    assert set(table["kind"]) == {"head", "resid_pre", "mlp_out", "resid_post"}
    assert result.facts["n"] == ioi.train.n
    whole = table.filter(site="resid_post.2").row(0, named=True)
    assert whole["effect"] == pytest.approx(1.0, abs=1e-4)
    assert whole["lo"] == pytest.approx(1.0, abs=1e-3)
    first = table.filter((table["kind"] == "resid_pre") & (table["layer"] == 0) & (table["position"] == "-1"))
    assert first["effect"].item() == pytest.approx(0.0, abs=1e-4)  # IOI's counterfactual ends in the same word
    assert table.filter(kind="head").height == 12
    assert result.tensors["values"].shape == (table.height, result.facts["n"])
    noise = hw.localize.patch(tiny_model, ioi, sites="resid_post.2", direction="noise")
    assert noise.to_frame()["effect"].item() == pytest.approx(1.0, abs=1e-4)
    assert noise.facts["clean"] == pytest.approx(result.facts["clean"])


def test_what_cannot_be_patched_is_refused(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=4, seed=0)
    for sites in ("pattern", "head.9", "head.0.h9", "mlp_out.0.h1", "head@S9", "", "resid_pre.0@x y"):
        with pytest.raises(SiteError):
            hw.localize.patch(tiny_model, ioi, sites=sites)
    with pytest.raises(MethodError, match="direction"):
        hw.localize.patch(tiny_model, ioi, direction="sideways")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="metric"):
        hw.localize.patch(tiny_model, ioi, metric="loss")
    with pytest.raises(MethodError, match="memory_mb"):
        hw.localize.patch(tiny_model, ioi, memory_mb="lots")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="steps"):
        hw.localize.eap_ig(tiny_model, ioi, steps="many")


def test_names_of_others_are_read() -> None:
    assert [s.kind for s in read_spec("a1.h3", GRAPH)] == ["head"]
    assert [(s.kind, s.layer) for s in read_spec("m1", GRAPH)] == [("mlp_out", 1)]
    assert len(read_spec("head.*.h2@END", GRAPH)) == 2
