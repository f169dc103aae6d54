"""Interventions while a model learns: what they hold, what gradient flows, and that a text is all they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import headwater as hw
import tiny
from headwater.core.errors import HeadwaterError, MethodError, SiteError
from headwater.core.model import Model
from headwater.dynamics import train
from headwater.dynamics.lab.interventions import Interventions, parse, penalty
from headwater.dynamics.lab.patterns import pattern_named, patterns
from lab_runs import same_files, small, weights

IDS = torch.tensor([[5, 3, 5, 3, 7, 5], [1, 2, 3, 4, 5, 6]])


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Model:
    make: dict[str, Callable[..., Any]] = {"gpt2": tiny.tiny_gpt2, "llama": tiny.tiny_llama}
    hf = make[request.param](torch.float64)
    for weight in hf.parameters():
        weight.requires_grad_(True)
    return Model(hf.train() if request.param == "llama" else hf)


def step(model: Model, *lines: str, captures: tuple[str, ...] = (), at: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and captured values under these lines, with gradients into the weights."""
    held = Interventions([parse(line) for line in lines], model)
    on, penalties = held.at(at, IDS)
    sites = [site for pattern in captures for site in model.resolve(pattern)]
    with held.session(on, [*sites, *(site for _, site, _ in penalties)]).installed() as session:
        logits = model.hf(input_ids=IDS, use_cache=False).logits
    values = {name: kept.value for name, kept in session.kept.items()}
    for one, site, places in penalties:
        values["penalty"] = values.get("penalty", 0) + penalty(one, values[str(site)], places)
    return logits, values


def gradients(model: Model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name, _ in model.hf.named_parameters()]
    found = torch.autograd.grad(value, list(model.hf.parameters()), allow_unused=True)
    return {n: torch.zeros(1) if g is None else g for n, g in zip(names, found, strict=True)}


def plain_back(ids: torch.Tensor, distance: int) -> torch.Tensor:
    out = torch.zeros(*ids.shape, ids.shape[1])
    for t in range(distance, ids.shape[1]):
        out[:, t, t - distance] = 1
    return out


def test_patterns_are_what_they_say() -> None:
    assert torch.equal(pattern_named("previous_token")(IDS), plain_back(IDS, 1))
    assert torch.equal(pattern_named("back:3")(IDS), plain_back(IDS, 3))
    assert torch.equal(pattern_named("current_token")(IDS), plain_back(IDS, 0))
    duplicate, induction = pattern_named("duplicate_token")(IDS), pattern_named("induction")(IDS)
    for b, row in enumerate(IDS.tolist()):
        for t, token in enumerate(row):
            earlier = [s for s in range(t) if row[s] == token]
            for found, places in ((duplicate, earlier), (induction, [s + 1 for s in earlier])):
                wanted = torch.zeros(6)
                wanted[places] = 1 / max(1, len(places))
                assert torch.allclose(found[b, t], wanted), (b, t)
    for name in patterns.names():
        rows = pattern_named(name)(IDS)
        assert rows.shape == (2, 6, 6) and bool((rows.triu(1) == 0).all())
        assert bool(torch.isclose(rows.sum(-1), torch.ones(())).logical_or(rows.sum(-1) == 0).all())
    assert torch.allclose(pattern_named("uniform")(IDS)[0, 3], torch.tensor([0.25] * 4 + [0.0] * 2))
    assert torch.equal(pattern_named("first_token")(IDS)[1, :, 0], torch.ones(6))
    with pytest.raises(MethodError, match="previous_token"):
        pattern_named("previous")


def test_a_forced_pattern_holds_and_queries_learn_nothing(model: Model) -> None:
    logits, seen = step(model, 'force("pattern.1.h1", "previous_token")', captures=("pattern.1", "z.1"))
    own = model.run(IDS, capture="pattern.1")["pattern.1"]
    assert torch.equal(seen["pattern.1"][:, 1, 1:], plain_back(IDS, 1)[:, 1:].double())
    assert torch.allclose(seen["pattern.1"][:, 1, 0], own[:, 1, 0])  # the first token's row says nothing
    assert torch.allclose(seen["pattern.1"][:, 0], own[:, 0])
    # The gradient into the queries' and keys' weights of the forced head is exactly zero; into its values' it is not.
    found = gradients(model, logits.square().sum())
    if model.anatomy.family == "gpt2":
        fused = found["transformer.h.1.attn.c_attn.weight"].view(32, 3, 4, 8)
        q, k, v = (fused[:, i, 1] for i in range(3))
        other = fused[:, 0, 0]
    else:
        q = found["model.layers.1.self_attn.q_proj.weight"].view(4, 8, 32)[1]
        other = found["model.layers.1.self_attn.q_proj.weight"].view(4, 8, 32)[0]
        k, v = torch.zeros(1), found["model.layers.1.self_attn.v_proj.weight"]  # keys are shared with another head
    assert float(q.abs().max()) == 0.0 == float(k.abs().max())
    assert float(v.abs().max()) > 1e-6 and float(other.abs().max()) > 1e-9


def test_forcing_equals_attention_by_hand(model: Model) -> None:
    _, seen = step(model, 'force("pattern.0.h*", "previous_token")', captures=("z.0", "v.0"))
    v = seen["v.0"].repeat_interleave(model.n_heads // model.n_kv_heads, dim=2)
    assert torch.allclose(seen["z.0"][:, 1:], v[:, :-1])


@pytest.mark.parametrize("site", ["head.0.h1", "z.0.h1"])
def test_a_head_that_is_off_gets_no_gradient_at_all(model: Model, site: str) -> None:
    logits, _ = step(model, f'zero("{site}")')
    plain = model.run(IDS, interventions=[hw.zero(site)]).logits
    assert torch.allclose(logits, plain)
    found = gradients(model, logits.square().sum())
    if model.anatomy.family == "gpt2":
        off = found["transformer.h.0.attn.c_attn.weight"].view(32, 3, 4, 8)[:, :, 1]
        out = found["transformer.h.0.attn.c_proj.weight"].view(4, 8, 32)[1]
    else:
        off = found["model.layers.0.self_attn.q_proj.weight"].view(4, 8, 32)[1]
        out = found["model.layers.0.self_attn.o_proj.weight"].view(32, 4, 8)[:, 1]
    assert float(off.abs().max()) == 0.0 == float(out.abs().max())


def test_values_are_clamped_added_scaled_replaced_stopped(model: Model) -> None:
    own = step(model, captures=("mlp_out.1", "neurons.0", "resid_pre.2"))[1]
    clamped = step(model, 'clamp("neurons.0", low=-0.01, high=0.02)', captures=("neurons.0",))[1]["neurons.0"]
    assert torch.equal(clamped, own["neurons.0"].clamp(-0.01, 0.02))
    added = step(model, 'add("mlp_out.1", 0.5)', captures=("mlp_out.1",))[1]["mlp_out.1"]
    assert torch.allclose(added, own["mlp_out.1"] + 0.5)
    scaled = step(model, 'scale("mlp_out.1", 3)', captures=("mlp_out.1",))[1]["mlp_out.1"]
    assert torch.allclose(scaled, 3 * own["mlp_out.1"])
    off = step(model, 'scale("mlp_out.1", 0)', captures=("mlp_out.1",))[1]["mlp_out.1"]
    assert not off.any()
    put = step(model, 'replace("mlp_out.1", 0.25)', captures=("mlp_out.1",))[1]["mlp_out.1"]
    assert bool((put == 0.25).all())
    logits, values = step(model, 'stop("resid_pre.2")', captures=("resid_pre.2",))
    assert torch.allclose(values["resid_pre.2"], own["resid_pre.2"])
    below = gradients(model, logits.square().sum())
    first = next(n for n in below if ("h.1." in n or "layers.1." in n) and n.endswith("weight"))
    last = next(n for n in below if ("h.2." in n or "layers.2." in n) and n.endswith("weight"))
    assert float(below[first].abs().max()) == 0.0 < float(below[last].abs().max())


def test_attention_is_scaled_at_named_places_only(model: Model) -> None:
    own = step(model, captures=("pattern.0", "scores.0"))[1]
    at = plain_back(IDS, 1)[:, None].expand(-1, model.n_heads, -1, -1) > 0
    scaled = step(model, 'scale("pattern.0", 10, at="previous_token")', captures=("pattern.0",))[1]["pattern.0"]
    assert torch.allclose(scaled, torch.where(at, 10 * own["pattern.0"], own["pattern.0"]))
    raised = step(model, 'add("scores.0.h1", 2.0, at="previous_token")', captures=("pattern.0",))[1]["pattern.0"]
    by_hand = torch.where(at, own["scores.0"] + 2.0, own["scores.0"]).softmax(-1)
    assert torch.allclose(raised[:, 1], by_hand[:, 1]) and torch.allclose(raised[:, 0], own["pattern.0"][:, 0])


def test_a_penalty_is_the_mean_attention(model: Model) -> None:
    _, values = step(model, 'penalize("pattern.1.h2", "duplicate_token", weight=0.5)')
    own = model.run(IDS, capture="pattern.1")["pattern.1"][:, 2]
    reads = [own[0, 2, 0], own[0, 3, 1], own[0, 5, 0] + own[0, 5, 2]]
    assert torch.allclose(values["penalty"], 0.5 * torch.stack(reads).mean() / 2)  # the other repeats nothing
    found = gradients(model, values["penalty"])
    assert max(float(g.abs().max()) for g in found.values()) > 1e-9
    both = step(model, 'penalize("pattern.1.h*", "previous_token", weight=-1)')[1]["penalty"]
    assert both.item() < 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zero('z.0.h1'", "cannot read"),
        ("__import__('os').system('true')", "cannot read"),
        ("eval('1')", "unknown intervention"),
        ("zeros('z.0')", "zero"),
        ("zero()", "names no site"),
        ("zero('z.0', 3)", "do not fit"),
        ("zero(['z.0'])", "more than texts and numbers"),
        ("clamp('neurons.0', low=open('/etc/passwd'))", "more than texts and numbers"),
        ("clamp('neurons.0')", "needs a bound"),
        ("clamp('neurons.0', low=2, high=1)", "low above high"),
        ("force('pattern.0')", "lacks pattern"),
        ("force('pattern.0', 'previus_token')", "unknown attention pattern"),
        ("force('z.0', 'previous_token')", "needs a site of attention"),
        ("force('pattern.0@3', 'previous_token')", "takes no position"),
        ("scale('mlp_out.0', 'x')", "no number"),
        ("scale('mlp_out.0', 2, at='previous_token')", "needs a site of attention"),
        ("freeze('pattern.0.h1')", "whole sites"),
        ("freeze('pattern.0', 5)", "later model"),
        ("zero('zz.0')", "unknown kind"),
    ],
)
def test_lines_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(HeadwaterError, match=said):
        parse(text)


def test_sites_the_model_lacks_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no layer 9"):
        Interventions([parse("zero('mlp_out.9')")], model)
    with pytest.raises(SiteError, match="does not have"):
        train(small(interventions=[{"do": "zero('z.0.h7')"}]), tmp_path / "run")


def lines(*texts: str, steps: Any = (0, None)) -> list[dict[str, Any]]:
    return [{"do": text, "steps": list(steps)} for text in texts]


def test_nothing_is_changed_outside_the_steps(tmp_path: Path) -> None:
    """Before the window the bits are those of a run without it; within it, and so after it, they differ."""
    bare = train(small(), tmp_path / "bare")
    held = train(small(interventions=lines('zero("mlp_out.1")', steps=(5, 8))), tmp_path / "held")
    assert same_files(bare.path, held.path, [0, 1, 2, 4, 5])
    first = weights(held.folder(5))["transformer.h.1.mlp.c_proj.weight"]
    assert not torch.equal(first, weights(bare.folder(8))["transformer.h.1.mlp.c_proj.weight"])
    assert bare.curve["loss"][:5].to_list() == held.curve["loss"][:5].to_list()
    assert bare.curve["loss"][5] != held.curve["loss"][5]


def test_a_head_that_is_off_stays_as_it_was_made(tmp_path: Path) -> None:
    """No gradient and no decay: Adam must not move it by as much as a rounding error."""
    config = small(interventions=lines('zero("head.0.h1")'), optimizer={"lr": 0.01})
    run = train(config, tmp_path / "run")
    before, after = (weights(run.folder(s))["transformer.h.0.attn.c_attn.weight"].view(16, 3, 2, 8) for s in (0, 12))
    assert torch.equal(before[:, :, 1], after[:, :, 1]) and not torch.equal(before[:, :, 0], after[:, :, 0])


def test_frozen_values_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Attention frozen at step 3 equals attention of the model of step 3 on the same batch, also after going on."""
    model = {"d_model": 16, "n_heads": 2}
    config = small(model=model, interventions=lines('freeze("pattern.0")', 'freeze("pattern.1", 2)', steps=(3, 9)))
    train(config, tmp_path / "cut", stop_at=6)
    cut, whole = train(config, tmp_path / "cut"), train(config, tmp_path / "whole")
    assert 3 in whole.steps and cut.result.content_hash == whole.result.content_hash
    # The loss of step 9's update, by hand: the model of step 8 with the patterns of steps 3 and 2.
    ids = torch.from_numpy(whole.order.step(8))[:, :-1]
    held = [
        hw.freeze(f"pattern.{layer}", whole.load(step).run(ids, capture=f"pattern.{layer}"))
        for layer, step in ((0, 3), (1, 2))
    ]
    logits = whole.load(8).run(ids, interventions=held).logits
    labels = torch.from_numpy(whole.order.step(8))[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert whole.curve["loss"][8] == pytest.approx(float(loss), rel=1e-5)


def test_validation_is_of_the_model_as_it_is_or_held(tmp_path: Path) -> None:
    source = {"source": "induction", "options": {"vocabulary": 12, "length": 12, "seed": 5}, "sequences": 8}
    config = small(
        interventions=lines('zero("mlp_out.*")', 'freeze("pattern.0")', steps=(4, 9)), validate_every=2,
        validation=[{**source, "name": "bare"}, {**source, "name": "held", "held": True}], checkpoints={"every": 2},
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    table = run.result.tables["validation"]
    losses = {
        name: dict(table.filter(table["name"] == name).select("step", "loss").iter_rows()) for name in ("bare", "held")
    }
    assert losses["bare"][2] == losses["held"][2] and losses["bare"][10] == losses["held"][10]
    ids = torch.from_numpy(run.data.validation["held"][0])
    first = run.load(4).run(ids[:, :-1], capture="pattern.0")
    on = [hw.zero("mlp_out.*"), hw.freeze("pattern.0", first)]
    logits = run.load(6).run(ids[:, :-1], interventions=on).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert losses["held"][6] == pytest.approx(float(loss), rel=1e-5) != losses["bare"][6]


def test_a_penalty_moves_attention(tmp_path: Path) -> None:
    def attention(weight: float) -> float:
        text = f'penalize("pattern.0.h1", "previous_token", weight={weight})'
        config = small(interventions=lines(text), steps=30, model={"d_model": 16, "n_heads": 2}, checkpoints={})
        run = train(config, tmp_path / str(weight))
        pattern = run.load().run(torch.from_numpy(run.order.step(0)), capture="pattern.0.h1")["pattern.0.h1"]
        return float(pattern.diagonal(-1, 1, 2).mean())

    assert attention(5.0) < attention(0.0001) - 0.02
    assert attention(-5.0) > attention(0.0001) + 0.02


def test_micro_batches_hold_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": {"d_model": 16, "n_heads": 2}, "dtype": "float64", "steps": 4,
        "interventions": lines(
            'force("pattern.0.h0", "induction")',
            'freeze("mlp_out.1", 1)',
            'penalize("pattern.1.h0", "induction", 0.1)',
            steps=(1, 4),
        ),
    }  # fmt: skip
    whole = train(small(**options), tmp_path / "whole")
    parts = train(small(**options, micro_batch=3), tmp_path / "parts")
    assert whole.curve["loss"].to_list() == pytest.approx(parts.curve["loss"].to_list(), rel=1e-10)
