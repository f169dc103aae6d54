"""AtP*'s parts equal their plain definitions: gradients, the softmax computed again, dropped layers, real patches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.localize.attribution.attention_nodes import AttentionNodes, node_names, parts_of
from headwater.localize.attribution.missed import as_nodes, bound_missed, random_sets
from headwater.localize.engine.passes import Engine, Scored, make_batches
from localize_families import LAYERS, bound, make, pairs

FAMILIES = ["llama", "gpt2", "neox", "gptj", "gemma2", "qwen3", "olmo2", "opt", "granite", "phi3"]
KINDS = {"q": "q", "k": "k", "v": "v", "z": "z", "mlp": "mlp_out"}


def value(group: Any, logits: Tensor) -> Tensor:
    return metric("logit_diff")(logits, group.answers, group.foils, None)


def plain(model: Model, group: Any, drop: int | None = None) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """site -> (prompt's value, counterfactual's, gradient on the prompt), with the gradient through a layer dropped."""
    sites = ["embed", *(f"{kind}.{layer}" for layer in range(LAYERS) for kind in KINDS.values())]
    blocks = [block.module for block in model.anatomy.main.blocks]
    handles = []
    if drop is not None:

        def cut(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            new = out[0] if isinstance(out, tuple) else out
            new = x + (new - x).detach()
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handles.append(blocks[drop].register_forward_hook(cut, with_kwargs=True))
    plainly = model.run(group.clean, capture=sites, logits="none")
    # what is captured may be a view of what the model goes on with, so gradients are taken at something added there
    added = [torch.zeros_like(plainly[site]).requires_grad_(True) for site in sites]
    try:
        moved = [hw.add(site, zero) for site, zero in zip(sites, added, strict=True)]
        logits = model.run(group.clean, logits="last", grad=True, interventions=moved).logits
    finally:
        for handle in handles:
            handle.remove()
    corrupt = model.run(group.corrupt, capture=sites, logits="last")
    found = torch.autograd.grad(value(group, logits).sum(), added, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(added, found, strict=True)]
    return {s: (plainly[s], corrupt[s], g) for s, g in zip(sites, gradients, strict=True)}


def flat(model: Model, known: dict[str, tuple[Tensor, Tensor, Tensor]], group: Any, fix: bool) -> Tensor:
    """[nodes, B] scores at all positions by definition, in the order of `node_names`."""
    engine = Engine(model)
    graph = engine.wiring.graph
    out = torch.zeros(len(node_names(graph)), len(group), dtype=torch.float64)
    ours, theirs, g = known["embed"]
    out[0] = ((ours - theirs) * g).sum(dim=(1, 2))
    for layer in range(LAYERS):
        at = parts_of(graph, layer)
        for part, kind in KINDS.items():
            site = f"{kind}.{layer}"
            ours, theirs, g = known[site]
            if part == "mlp":
                out[at[part]] = ((ours - theirs) * g).sum(dim=(1, 2))
            elif part in "qk" and fix:
                z, _, g_z = known[f"z.{layer}"]
                for head in range(ours.shape[2]):
                    mixed = ours.clone()
                    mixed[:, :, head] = theirs[:, :, head]
                    run = model.run(group.clean, capture=[f"z.{layer}"], interventions=[hw.replace(site, mixed)])
                    out[at[part].start + head] = ((z - run[f"z.{layer}"]) * g_z).sum(dim=(1, 2, 3))
            else:
                out[at[part]] = ((ours - theirs) * g).sum(dim=(1, 3)).T
    return out


@pytest.mark.parametrize("fix", [True, False], ids=["softmax again", "gradient"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_their_definition(name: str, fix: bool) -> None:
    model, group = make(name), pairs(3, 6, 2)
    known = plain(model, group)
    expected = flat(model, known, group, fix)
    dropped = [flat(model, plain(model, group, drop=layer), group, fix).abs() for layer in range(LAYERS)]
    sizes = torch.stack(dropped).sum(dim=0)
    sizes[0] /= LAYERS
    sizes[1:] /= LAYERS - 1
    near = 1e-6 if name in ("gptj", "gemma2") else 1e-9
    biggest = float(expected.abs().max())
    assert biggest > 1e-2
    for reuse in (True, False):
        scorer = AttentionNodes(Engine(model), Scored.named("logit_diff"), fix=fix)
        for batch in make_batches(bound(group), 1000, reuse_prefix=reuse):
            _, scores, own, clean, corrupt = scorer.scores(batch, drop=True)
            torch.testing.assert_close(scores[:, 0], expected[:, batch.rows], rtol=0, atol=near * biggest)
            torch.testing.assert_close(own[:, 0], sizes[:, batch.rows], rtol=0, atol=near * biggest)
            assert float((clean - corrupt).abs().min()) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_patches_are_real(name: str) -> None:
    """Nodes patched alone, together, and at one position equal interventions of the core at those sites."""
    model, group = make(name), pairs(3, 6, 2)
    known = plain(model, group)
    engine = Engine(model)
    scorer = AttentionNodes(engine, Scored.named("logit_diff"), positions="each")
    (batch,) = make_batches(bound(group), 1000)
    places = [str(t - 4) for t in range(4)]
    wanted, chosen = [], []
    for layer in range(LAYERS):
        at = parts_of(scorer.graph, layer)
        for part, kind in KINDS.items():
            for positions in (range(2, 6), [3], [5]):
                ours, theirs, _ = known[f"{kind}.{layer}"]
                mixed, head = ours.clone(), 1
                for t in positions:
                    if part == "mlp":
                        mixed[:, t] = theirs[:, t]
                    else:
                        mixed[:, t, head] = theirs[:, t, head]
                run = model.run(group.clean, logits="last", interventions=[hw.replace(f"{kind}.{layer}", mixed)])
                wanted.append(value(group, run.logits))
                node = at[part].start + (0 if part == "mlp" else head)
                chosen.append(as_nodes([(node, t - 2) for t in positions], len(scorer.names), 4))
    both = [hw.replace("embed", known["embed"][1]), hw.replace("z.1", known["z.1"][1])]
    wanted.append(value(group, model.run(group.clean, logits="last", interventions=both).logits))
    heads = range(*parts_of(scorer.graph, 1)["z"].indices(1000))
    chosen.append(as_nodes([(u, t) for u in (0, *heads) for t in range(4)], len(scorer.names), 4))
    clean, found = scorer.patched(batch, places, chosen)
    near = 1e-5 if name in ("gptj", "gemma2") else 1e-9
    torch.testing.assert_close(found, torch.stack(wanted), rtol=near, atol=near)
    torch.testing.assert_close(clean, value(group, model.run(group.clean, logits="last").logits), rtol=near, atol=near)


def saturated(scale: float = 5000.0) -> Model:
    """Linear in all but the softmax of one head of the first layer, which is saturated on every prompt."""
    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, activation_function="linear",
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(config).double().eval()
    for layer, block in enumerate(hf.transformer.h):
        queries = block.attn.c_attn.weight.data[:, :64]
        queries[:, 8 if layer == 0 else 0 : 32] = 0
        queries[:, 40 if layer == 0 else 32 :] = 0
        if layer == 0:
            queries[:, :8] *= scale
        block.attn.c_attn.bias.data[:64] = 0
        block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
    hf.transformer.ln_f = torch.nn.Identity()
    return Model(hf, None)


def test_a_saturated_head_is_missed_by_atp_and_found_by_atp_star() -> None:
    """A head attends with weight 1 to one token on the prompt, to another on the counterfactual."""
    model, group = saturated(), pairs(4, 6, 2)
    engine, scored = Engine(model), Scored.named("logit_diff")
    (batch,) = make_batches(bound(group), 1000)
    star = AttentionNodes(engine, scored, fix=True)
    alone = [as_nodes([(u, 0)], len(star.names), 1) for u in range(len(star.names))]
    clean, patched = star.patched(batch, ["all"], alone)
    true = clean - patched
    mended = star.scores(batch, drop=False)[1][:, 0]
    first_order = AttentionNodes(engine, scored, fix=False).scores(batch, drop=False)[1][:, 0]
    for part in "qk":
        at = parts_of(star.graph, 0)[part].start
        assert float(true[at].abs().max()) > 0.05  # it matters
        assert float(first_order[at].abs().max()) < 1e-3 * float(true[at].abs().max())  # plain AtP: a false negative
        torch.testing.assert_close(mended[at], true[at], rtol=1e-9, atol=1e-9)  # linear behind the softmax: exact
    worse = (mended - true).abs() > (first_order - true).abs() + 1e-9
    inside = [u for layer in (0, 1) for part in "qk" for u in range(*parts_of(star.graph, layer)[part].indices(1000))]
    assert not bool(worse[inside].any())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_errors_against_true_patching(name: str) -> None:
    """On models with bends everywhere: with the softmax computed again, queries and keys err less on the whole."""
    model, group = make(name), pairs(6, 6, 2)
    for layer in model.hf.modules():
        for path in ("q_proj", "c_attn"):
            module = getattr(layer, path, None)
            if module is not None and getattr(module, "weight", None) is not None:
                weight = module.weight.data
                (weight[:, :32] if path == "c_attn" else weight).mul_(4.0)
    engine, scored = Engine(model), Scored.named("logit_diff")
    (batch,) = make_batches(bound(group), 1000)
    star, gradient = (AttentionNodes(engine, scored, fix=fix) for fix in (True, False))
    names = star.names
    clean, patched = star.patched(batch, ["all"], [as_nodes([(u, 0)], len(names), 1) for u in range(len(names))])
    true = clean - patched
    at = [parts_of(star.graph, layer)[part] for layer in range(LAYERS) for part in "qk"]
    inside = [u for nodes in at for u in range(nodes.start, nodes.stop)]
    error = []
    for scorer in (star, gradient):
        difference = (scorer.scores(batch, drop=False)[1][:, 0] - true)[inside]
        error.append(float(difference.square().mean().sqrt()))
    assert error[0] < error[1]


def test_gradient_drop_finds_what_cancels() -> None:
    """A layer that undoes what came before it hides it from AtP; with that layer dropped the direct effect stands."""
    model, group = saturated(scale=1.0), pairs(4, 6, 2)
    first, second = model.hf.transformer.h
    # the second MLP subtracts whatever the stream holds: out = -x for the part of the stream that it reads
    eye = torch.eye(32, dtype=torch.float64)
    second.mlp.c_fc.weight.data.zero_()
    second.mlp.c_fc.weight.data[:, :32] = eye
    second.mlp.c_proj.weight.data.zero_()
    second.mlp.c_proj.weight.data[:32] = -eye
    second.mlp.c_proj.bias.data.normal_()
    second.attn.c_proj.weight.data.zero_()
    del first
    engine, scored = Engine(model), Scored.named("logit_diff")
    (batch,) = make_batches(bound(group), 1000)
    scorer = AttentionNodes(engine, scored, fix=True)
    _, scores, plain_sizes, _, _ = scorer.scores(batch, drop=False)
    _, _, sizes, _, _ = scorer.scores(batch, drop=True)
    at = parts_of(scorer.graph, 0)["mlp"].start
    assert float(plain_sizes[at].max()) < 1e-9
    assert float(sizes[at].min()) > 1e-2
    assert float(scores[at].abs().max()) < 1e-9


def test_the_bound_holds_where_effects_add() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(40, generator=generator, dtype=torch.float64)
    for seed in range(5):
        sets = random_sets(40, 60, seed)
        assert bool((sets.sum(dim=0) == 30).all())
        missed = bound_missed(sets, sets.double() @ true, 0.95)
        assert bool((missed.limits >= true.abs()).all())
        assert missed.bound == float(missed.limits.max())
        assert missed.bound < 6 * float(true.abs().max())
    assert float((missed.estimates - true).abs().mean()) < 2.0
    bounds = []
    for n in (8, 400):
        sets = random_sets(40, n, 1)
        bounds.append(bound_missed(sets, sets.double() @ true, 0.95).bound)
    assert bounds[1] < bounds[0]


# --- as users call them


@pytest.mark.parametrize("positions", ["all", "named", "each"])
def test_atp_star_as_a_method(tiny_model: Any, positions: str) -> None:
    ioi = hw.behavior("ioi", n=16, seed=0)
    result = hw.localize.atp_star(tiny_model, ioi, positions=positions, verify=4, subsets=8)
    again = hw.localize.atp_star(tiny_model, ioi, positions=positions, verify=4, subsets=8)
    assert again.content_hash == result.content_hash
    nodes, verified, missed = (result.tables[name] for name in ("nodes", "verified", "missed"))
    assert verified.height == 4
    assert verified.height + missed.height == nodes.height
    assert result.facts["bound"] == pytest.approx(missed["limit"].max())
    assert verified["size"].to_list() == sorted(verified["size"].to_list(), reverse=True)
    assert float(nodes["score"].abs().max()) == pytest.approx(float(verified["size"][0]))  # type: ignore[arg-type]
    assert ("position" in nodes.columns) is (positions != "all")
    assert set(nodes["part"]) == {"input", "query", "key", "value", "head", "mlp"}
    assert result.top(3).height == 3
    with pytest.raises(MethodError, match="scores nodes"):
        result.circuit(edges=3)


def test_a_verified_head_is_what_patch_says(tiny_model64: Any) -> None:
    ioi = hw.behavior("ioi", n=8, seed=0)
    result = hw.localize.atp_star(tiny_model64, ioi, verify=200, subsets=0)
    heads = hw.localize.patch(tiny_model64, ioi, sites="head", direction="noise").to_frame()
    span = result.facts["clean"] - result.facts["corrupt"]
    effects = dict(zip(result.tables["verified"]["node"], result.tables["verified"]["effect"], strict=True))
    for row in heads.iter_rows(named=True):
        assert effects[f"a{row['layer']}.h{row['head']}"] == pytest.approx(row["effect"] * span, abs=1e-6)
    assert "missed" not in result.tables


def test_positions_of_what_is_linear_add_up(tiny_model64: Any) -> None:
    """Queries, values, heads and MLPs; keys of one softmax do not."""
    ioi = hw.behavior("ioi", n=12, seed=0)
    whole = hw.localize.atp_star(tiny_model64, ioi, verify=0, subsets=0)
    for positions in ("named", "each"):
        parts = hw.localize.atp_star(tiny_model64, ioi, positions=positions, verify=0, subsets=0)
        linear = [i for i, part in enumerate(whole.tables["nodes"]["part"]) if part != "key"]
        summed = parts.tensors["estimates"].sum(dim=1)
        torch.testing.assert_close(summed[linear], whole.tensors["estimates"][linear], rtol=1e-6, atol=1e-8)


def test_what_makes_no_sense_is_refused(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=8, seed=0)
    for options in ({"subsets": 3}, {"verify": -1}, {"confidence": 1.0}, {"metric": "kl"}, {"positions": "some"}):
        with pytest.raises(MethodError):
            hw.localize.atp_star(tiny_model, ioi, **options)
    assert hw.localize.grad_drop(tiny_model, ioi).facts["method"] == "grad_drop"
    with pytest.raises(MethodError, match="unknown option"):
        hw.localize.grad_drop(tiny_model, ioi, verify=3)


def test_heads_and_mlps_are_scored_as_by_atp(tiny_model64: Any) -> None:
    ioi = hw.behavior("ioi", n=12, seed=0)
    star = hw.localize.atp_star(tiny_model64, ioi, verify=0, subsets=0)
    scores = dict(zip(star.tables["nodes"]["node"], star.tables["nodes"]["estimate"], strict=True))
    for row in hw.localize.atp(tiny_model64, ioi).to_frame().iter_rows(named=True):
        assert scores[row["node"]] == pytest.approx(row["score"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2"])
def test_pairs_that_share_all_but_their_last_token(name: str) -> None:
    """One position is run: the scores are those of whole runs."""
    from headwater.localize.attribution.ig_activations import score_batch
    from headwater.localize.attribution.layer_paths import WriteScorer
    from headwater.localize.engine.edges import EdgeScorer

    engine, scored = Engine(make(name)), Scored.named("logit_diff")
    found = []
    for reuse in (True, False):
        (batch,) = make_batches(bound(pairs(3, 6, 5)), 1000, reuse_prefix=reuse)
        assert batch.suffix == (1 if reuse else 6)
        edges = EdgeScorer(engine, scored)
        edges.add(batch, [(0.0, 0.5), (1.0, 0.5)])
        score_batch(edges, batch, [(0.5, 0.5), (1.0, 0.5)], "all")
        score_batch(edges, batch, [(0.5, 0.5), (1.0, 0.5)], "own")
        writes = WriteScorer(engine, scored).scores(batch, [(0.5, 0.5), (1.0, 0.5)]).sum(dim=2)
        scorer = AttentionNodes(engine, scored)
        _, scores, sizes, _, _ = scorer.scores(batch, drop=True)
        everything = torch.ones(len(scorer.names), 1, dtype=torch.bool)
        _, patched = scorer.patched(batch, ["all"], [everything])
        found.append((edges.total, writes, scores[:, 0], sizes[:, 0], patched))
    near = 1e-6 if name == "gemma2" else 1e-9
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=near * float(other.abs().max()))
