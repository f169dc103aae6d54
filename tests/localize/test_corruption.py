"""What is put in and into what: sweeps equal single interventions through model.run, for every corruption and set."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError, SiteError
from headwater.localize.engine.cost import counted
from headwater.localize.engine.passes import Engine, Scored, make_batches
from headwater.localize.engine.planning import plan
from headwater.localize.engine.sweep import Joint, Sweep, Target
from headwater.localize.patching.corruption import Means, Noise, donors, with_starts, without_prefix, zeros
from headwater.localize.patching.disagreement import compare_metrics
from localize_families import LAYERS, LAYOUTS, bound, make, pairs

DIFF = metric("logit_diff")


def at_positions(target: Target, group: Any) -> tuple[int, ...]:
    if target.position is None:
        return tuple(range(group.length))
    if ":" in target.position:
        low, high = target.position.split(":")
        return tuple(range(group.length))[slice(int(low) if low else None, int(high) if high else None)]
    return tuple(int(p) % group.length for p in target.position.split(","))


def interventions(target: Target, other: Any, group: Any) -> list[Any]:
    """The other run's values of one target, position by position."""
    site = f"{target.kind}.{target.layer}" + ("" if target.head is None else f".h{target.head}")
    return [hw.resample(f"{site}@{p}", other[site][:, p]) for p in at_positions(target, group)]


def swept(model: Any, group: Any, patches: list[Any], **options: Any) -> dict[Any, torch.Tensor]:
    engine = Engine(model)
    (batch,) = make_batches(bound(group), 1000)
    batch = options.pop("change", lambda b: b)(batch)
    settings: dict[str, Any] = {"base_is_clean": False, "reuse": True} | options
    with engine.open(), ExitStack() as stack:
        batch = Scored.named("logit_diff").narrowed(stack, engine, batch)
        sweep = Sweep(engine, Scored.named("logit_diff"), batch, **settings)
        return {"base": sweep.base_value, "other": sweep.other_value} | dict(sweep.values(patches, 60))


def sets_of(name: str) -> list[Joint]:
    parallel = LAYOUTS[name].parallel
    t = Target
    sets = [
        (t(kind="attn_out", layer=0), t(kind="mlp_out", layer=0)),
        (t(kind="attn_out", layer=0, position="2:5"), t(kind="attn_out", layer=1, position="-1,3")),
        (t(kind="head", layer=0, head=1), t(kind="head", layer=0, head=2, position="-2"), t(kind="mlp_out", layer=1)),
        (t(kind="head", layer=0, head=1), t(kind="head", layer=1, head=3)),
        (t(kind="resid_pre", layer=0, position="3"), t(kind="resid_post", layer=0, position="-1")),
        (t(kind="mlp_out", layer=0), t(kind="resid_post", layer=0, position="4"), t(kind="resid_post", layer=1)),
        (t(kind="mlp_out", layer=0, position="2:"), t(kind="mlp_out", layer=1, position="2:")),
        (t(kind="resid_pre", layer=1, position="3"), t(kind="head", layer=1, head=0), t(kind="mlp_out", layer=1)),
        (t(kind="q", layer=0, head=1), t(kind="attn_out", layer=1), t(kind="k", layer=1, head=0)),
    ]
    if not parallel:
        sets += [
            (t(kind="resid_mid", layer=0, position="3"), t(kind="resid_mid", layer=1)),
            (t(kind="head", layer=0, head=0), t(kind="resid_mid", layer=0, position="-1")),
            (t(kind="resid_pre", layer=0, position="2"), t(kind="resid_mid", layer=1, position="-1")),
        ]
    return [Joint(parts=parts, layer=0, name=str(i)) for i, parts in enumerate(sets)]


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "phi", "gemma2", "granite", "opt"])
def test_sets_equal_many_interventions_at_once(name: str, reuse: bool) -> None:
    model, group = make(name), pairs(3, 6, 2)
    kinds = ["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k"]
    kinds += [] if LAYOUTS[name].parallel else ["resid_mid"]
    other = model.run(group.clean, capture=[f"{kind}.*" for kind in kinds] + ["head.*.h*", "q.*.h*", "k.*.h*"])
    sets = sets_of(name)
    found = swept(model, group, sets, reuse=reuse, made=True)
    for joint in sets:
        changes = [change for part in joint.parts for change in interventions(part, other, group)]
        run = model.run(group.corrupt, interventions=changes, logits="last")
        expected = DIFF(run.logits, group.answers, group.foils)
        torch.testing.assert_close(found[joint], expected, rtol=1e-8, atol=1e-8, msg=lambda m, j=joint: f"{j}: {m}")
        assert not torch.allclose(expected, found["base"]) or joint.name in "345"


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "qwen3", "gemma2", "stablelm"])
def test_queries_keys_and_values(name: str) -> None:
    model, group = make(name), pairs(3, 6, 2)
    targets = [
        Target(kind=kind, layer=layer, head=head, position=position)  # type: ignore[arg-type]
        for kind in ("q", "k", "v")
        for layer in range(LAYERS)
        for head in (0, LAYOUTS[name].kv - 1)
        for position in (None, "3", "-1")
    ]
    other = model.run(group.clean, capture=["q.*.h*", "k.*.h*", "v.*.h*"])
    found = swept(model, group, targets, made=True)
    for target in targets:
        run = model.run(group.corrupt, interventions=interventions(target, other, group), logits="last")
        expected = DIFF(run.logits, group.answers, group.foils)
        torch.testing.assert_close(found[target], expected, rtol=1e-8, atol=1e-8, msg=lambda m, t=target: f"{t}: {m}")


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt"])
@pytest.mark.parametrize("corruption", ["zero", "mean", "mean_positional", "resample"])
def test_fixed_values_equal_interventions(name: str, corruption: str) -> None:
    model, group = make(name), pairs(4, 6, 2)
    engine = Engine(model)
    sites = ["resid_pre.1", "resid_post.0", "attn_out.0", "mlp_out.1", "head.0.h2"]
    clean = model.run(group.clean, capture=[*sites, "z.0.h2"])
    corrupt = model.run(group.corrupt, capture=[*sites, "z.0.h2"])
    given = donors(bound(group), 5)
    assert set(given) == set(group.rows)
    (batch,) = make_batches(bound(group), 1000, reuse_prefix=False)
    fill: Any = zeros
    if corruption in ("mean", "mean_positional"):
        fill = Means(corruption == "mean_positional", False).learn(engine, [batch]).fill
    if corruption == "resample":
        from headwater.localize.patching.corruption import resampled

        fill = resampled(given, False)
        assert all((given[row] != group.clean[i]).any() for i, row in enumerate(group.rows))
        donated = model.run(torch.stack([given[row] for row in group.rows]), capture=sites)
    targets = [
        Target(kind=site.split(".")[0], layer=int(site.split(".")[1]), head=2 if "h2" in site else None, position=p)  # type: ignore[arg-type]
        for site in sites
        for p in (None, "-1", "3", "0")
    ]
    found = swept(model, group, targets, base_is_clean=True, fill=fill, change=without_prefix)
    torch.testing.assert_close(
        found["base"], DIFF(model.run(group.clean, logits="last").logits, group.answers, group.foils)
    )
    torch.testing.assert_close(
        found["other"], DIFF(model.run(group.corrupt, logits="last").logits, group.answers, group.foils)
    )
    for target in targets:
        site = f"{target.kind}.{target.layer}" + ("" if target.head is None else f".h{target.head}")
        value = {
            "zero": torch.zeros_like(clean[site]),
            "mean": corrupt[site].mean(dim=(0, 1), keepdim=True).expand_as(clean[site]),
            "mean_positional": corrupt[site].mean(dim=0, keepdim=True).expand_as(clean[site]),
            "resample": donated[site] if corruption == "resample" else None,
        }[corruption]
        assert value is not None
        changes = [hw.resample(f"{site}@{p}", value[:, p]) for p in at_positions(target, group)]
        run = model.run(group.clean, interventions=changes, logits="last")
        expected = DIFF(run.logits, group.answers, group.foils)
        torch.testing.assert_close(found[target], expected, rtol=1e-8, atol=1e-8, msg=lambda m, t=target: f"{t}: {m}")


@pytest.mark.parametrize("base_is_clean", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_noise_equals_noised_embeddings(name: str, base_is_clean: bool) -> None:
    model, group = make(name), pairs(3, 6, 2)
    group.positions["S"], group.positions["S[0]"] = torch.tensor([3, 4, 4]), torch.tensor([3, 3, 2])
    engine, samples = Engine(model), 3
    noise = Noise(at="S[:]", samples=samples, deviation=0.7, seed=2)
    (batch,) = make_batches(bound(group), 1000)
    drawn = noise.draw(engine, batch)
    assert ((drawn.abs().sum(-1) > 0).sum(-1).tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert not torch.equal(drawn[0], drawn[1])
    one = {"clean": batch.clean[1:2], "corrupt": batch.corrupt[1:2], "rows": batch.rows[1:2]}
    alone = noise.draw(engine, replace(batch, **one, positions={k: v[1:2] for k, v in batch.positions.items()}))
    torch.testing.assert_close(alone, drawn[3:6])
    targets = [
        Target(kind="resid_post", layer=0, position="3"),
        Target(kind="mlp_out", layer=1),
        Target(kind="head", layer=0, head=1),
    ]
    found = swept(
        model, group, targets, base_is_clean=base_is_clean, noise=drawn, change=lambda b: noise.batch(engine, b)
    )
    embedding = model.hf.get_input_embeddings()
    ids = group.clean.repeat_interleave(samples, dim=0)
    sites = ["resid_post.0", "mlp_out.1", "head.0.h1"]

    def run(noised: bool, **options: Any) -> Any:
        handle = embedding.register_forward_hook(lambda m, a, y: y + drawn.to(y)) if noised else None
        try:
            return model.run(ids, **options)
        finally:
            if handle is not None:
                handle.remove()

    other = run(base_is_clean, capture=sites)
    answers, foils = (x.repeat_interleave(samples, dim=0) for x in (group.answers, group.foils))
    for target, site in zip(targets, sites, strict=True):
        places = at_positions(target, group)
        changes = [hw.resample(f"{site}@{p}", other[site][:, p]) for p in places]
        expected = DIFF(run(not base_is_clean, interventions=changes, logits="last").logits, answers, foils)
        torch.testing.assert_close(found[target], expected, rtol=1e-8, atol=1e-8)
        assert not torch.allclose(found[target], found["base"])


def test_patching_with_each_corruption(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=16, seed=0)
    for corruption in ("noise", "zero", "mean", "mean_positional", "resample"):
        result = hw.localize.patch(
            tiny_model, ioi, sites=["resid_pre.0", "head.1", "v.0"], corruption=corruption, samples=2
        )
        assert result.facts["corruption"] == corruption
        assert result.facts["direction"] == ("denoise" if corruption == "noise" else "noise")
        assert result.to_frame().height == 1 + 4 + 2
        planned = plan(
            "patch", tiny_model, ioi, sites=["resid_pre.0", "head.1", "v.0"], corruption=corruption, samples=2
        )
        assert planned.counts() == result.facts["ran"]
    whole = hw.localize.patch(tiny_model, ioi, sites="resid_pre.0", corruption="noise", samples=2, noise_at="S2")
    assert whole.to_frame()["effect"].item() == pytest.approx(1.0, abs=1e-4)  # the noise is all put back
    again = hw.localize.patch(
        tiny_model, ioi, sites="resid_pre.0", corruption="noise", samples=2, noise_at="S2", memory_mb=0.2
    )
    torch.testing.assert_close(again.tensors["values"], whole.tensors["values"], rtol=1e-4, atol=1e-5)
    assert again.facts["noise_deviation"] == pytest.approx(3 * 0.2, rel=0.3)  # embeddings are drawn with deviation 0.2


def test_spans_and_sets_by_name(tiny_model: Any) -> None:
    rows = [
        {
            "prompt": f"When {a} and {b} went to the store, {b} gave a drink to",
            "counterfactual": f"When {a} and {b} went to the store, {a} gave a drink to",
            "answer": f" {a}",
            "foil": f" {b}",
            "positions": {"names": [5, 5 + len(f"{a} and {b}")]},
        }
        for a, b in (("Mary", "John"), ("John", "Mary"))
    ]
    behavior = hw.Behavior.from_rows(rows)
    assert '"names[0]"' in with_starts(behavior, ["names"]).frame["positions"][0]
    sites = ["resid_pre.0@names[:]", "resid_pre.0@1:4", "resid_pre.0@names[0]", "resid_pre.0@1", "resid_pre.0@1,2,3"]
    table = hw.localize.patch(tiny_model, behavior, sites=sites, corruption="zero").to_frame()
    effect = dict(zip(table["position"], table["effect"], strict=True))
    assert effect["names[:]"] == effect["1:4"] == effect["1,2,3"] != 0
    assert effect["names[0]"] == effect["1"] != effect["1:4"]
    both = hw.localize.patch(tiny_model, behavior, sites=["head.0.h1+a1.h0", "attn_out.0@*+mlp_out.1@END"])
    row = both.to_frame().filter(site="head.0.h1+a1.h0").row(0, named=True)
    assert (row["kind"], row["layer"], row["head"]) == ("head", None, None)
    assert "attn_out.0@-1+mlp_out.1@END" in both.to_frame()["site"].to_list()
    slid = hw.localize.patch(tiny_model, behavior, sites="mlp_out@END", window=2).to_frame()
    assert slid["site"].to_list() == ["mlp_out.0-0@END", "mlp_out.0-1@END", "mlp_out.1-2@END"]
    assert slid["layer"].to_list() == [0, 1, 2]
    for wrong in ({"window": 0}, {"window": 2, "sites": "m0+m1"}, {"corruption": "zero", "direction": "denoise"}):
        with pytest.raises(MethodError):
            hw.localize.patch(tiny_model, behavior, **wrong)
    with pytest.raises(MethodError, match="corruption"):
        hw.localize.patch(tiny_model, behavior, corruption="blur")  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="position"):
        hw.localize.patch(tiny_model, behavior, sites="head@nose[:]")


def test_metrics_side_by_side(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=12, seed=0)
    names = ("prob_diff", "prob", "kl", "rank")
    with counted(tiny_model) as ran:
        result = hw.localize.patch(tiny_model, ioi, sites="head", metrics=names)
    alone = {name: hw.localize.patch(tiny_model, ioi, sites="head", metric=name) for name in ("logit_diff", *names)}
    assert ran.passes >= result.facts["ran"]["passes"] == alone["kl"].facts["ran"]["passes"]
    table = result.tables["metrics"]
    for name, one in alone.items():
        own = table.filter(metric=name)
        assert own["site"].to_list() == one.to_frame()["site"].to_list()
        assert own["effect"].to_list() == pytest.approx(one.to_frame()["effect"].to_list(), abs=1e-4), name
    assert result.tables["agreement"].height == 10
    assert set(result.tables["disagreement"].columns) >= {"site", "rank", "other_rank", "sign_differs"}
    assert result.tensors["values_kl"].shape == result.tensors["values"].shape


def test_disagreement_is_found_where_it_was_put() -> None:
    sites = [f"s{i}" for i in range(6)]
    agreement, differing = compare_metrics(
        sites, {"a": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], "b": [1.0, 0.8, -0.6, 0.4, 0.2, 0.001], "c": [1.0] * 6}
    )
    first = agreement.row(0, named=True)
    assert first["same_sign"] == pytest.approx(4 / 5)
    assert first["rank_correlation"] == pytest.approx(1 - 6 * (9 + 1 + 1 + 1) / (6 * 35))
    assert differing.filter(metric="a", other="b")["site"].to_list()[0] == "s2"
    assert differing.filter(metric="a", other="b")["sign_differs"].to_list() == [True]
    assert agreement.row(1, named=True)["rank_correlation"] is None
