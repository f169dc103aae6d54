"""What tells safe and grounded behavior apart: scores against their definitions by hand, detectors, actions."""

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import headwater as hw
import tiny
from headwater.act import effect
from headwater.act.catalog import act
from headwater.act.safety.entities import known_entities
from headwater.act.safety.grounding import context_scores, divergence, grounding
from headwater.act.safety.importance import angle, head_importance
from headwater.act.safety.telling import auroc, detectors_table, parts_table
from headwater.core.errors import MethodError


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(0)
    values, yes = random.integers(0, 6, 40).astype(float), random.random(40) < 0.4
    by_hand = [1.0 if a > b else 0.5 if a == b else 0.0 for a in values[yes] for b in values[~yes]]
    assert auroc(values, yes) == pytest.approx(np.mean(by_hand))
    assert auroc(-values, yes) == pytest.approx(1 - np.mean(by_hand))
    assert np.isnan(auroc(values, np.ones(40, dtype=bool)))


def test_divergence_is_that_of_jensen_and_shannon() -> None:
    from scipy.spatial.distance import jensenshannon

    one, other = torch.randn(3, 11), 3 * torch.randn(3, 11)
    wanted = [jensenshannon(a, b) ** 2 for a, b in zip(one.softmax(-1), other.softmax(-1), strict=True)]
    np.testing.assert_allclose(divergence(one, other).numpy(), wanted, rtol=1e-4)
    assert float(divergence(one, one).abs().max()) < 1e-6


def test_context_scores_by_hand() -> None:
    pattern, stream = torch.rand(2, 3, 9, 9).softmax(-1), torch.randn(2, 9, 5)
    context, share = torch.tensor([3, 6]), 0.4
    found = context_scores(pattern, stream, context, share)
    for b in range(2):
        inside = list(range(1, int(context[b]) + 1))
        count = max(1, int(np.ceil(share * len(inside))))
        for h in range(3):
            best = sorted(inside, key=lambda t: -float(pattern[b, h, -1, t]))[:count]
            mean = stream[b, best].mean(0)
            wanted = torch.nn.functional.cosine_similarity(mean, stream[b, -1], dim=0)
            assert float(found[b, h]) == pytest.approx(float(wanted), abs=1e-6)


def test_parts_are_chosen_in_the_direction_that_is_expected() -> None:
    yes = np.array([True] * 5 + [False] * 5)
    up, flat = yes.astype(float), np.zeros(10)
    values = {("head", "a0.h0"): up, ("head", "a0.h1"): -up, ("head", "a0.h2"): flat, ("mlp", "m0"): -up}
    table = parts_table(values, yes, {"head": 1, "mlp": -1}, 1)
    assert table.filter(pl.col("chosen"))["part"].to_list() == ["a0.h0", "m0"]
    found = detectors_table({"good": up, "constant": flat}, yes, ["constant"])
    assert found["auroc"].to_list() == [1.0, 0.5]
    assert found["baseline"].to_list() == [False, True]


@pytest.fixture(scope="module")
def conflict() -> Any:
    return hw.behavior("conflict", n=80, seed=0)


def test_grounding_reads_every_head_and_mlp_and_judges_on_other_pairs(tiny_model: Any, conflict: Any) -> None:
    found = grounding(tiny_model, conflict, parts=2)
    parts = found.tables["parts"]
    assert parts.height == tiny_model.n_layers * (tiny_model.n_heads + 1)
    assert parts["chosen"].sum() == 4
    assert set(found.to_frame()["detector"]) >= {"copying heads", "recalling MLPs", "confidence", "constant"}
    assert (found.to_frame()["n"] == conflict.test.bind(tiny_model).n).all()
    assert found.chart() is not None
    # what an MLP changes in the guess, by hand for one pair
    group = conflict.train.bind(tiny_model).groups[0]
    run = tiny_model.run(group.clean, capture=["resid_post.1", "mlp_out.1"], logits="none")
    after, wrote = run["resid_post.1"][:, -1], run["mlp_out.1"][:, -1]
    hf = tiny_model.hf
    with torch.no_grad():
        said = [hf.lm_head(hf.model.norm(x)).softmax(-1).double() for x in (after - wrote, after)]
    middle = (said[0] + said[1]) / 2
    wanted = torch.stack([(p * (p / middle).log()).sum(-1) for p in said]).mean(0)
    from headwater.act.safety.grounding import GroundingConfig, _read

    _, values = _read(tiny_model, group, GroundingConfig())
    np.testing.assert_allclose(values["mlp", "m1"].double().numpy(), wanted.numpy(), rtol=1e-3, atol=1e-6)


def test_ground_scales_heads_up_and_mlps_down(tiny_model: Any, conflict: Any) -> None:
    made = act("ground", tiny_model, conflict, parts=1, strengths=(1.0,), n=8, max_perplexity=100.0)
    scales = {i.site.kind: i.scale for i in made}
    assert scales == {"z": 2.0, "mlp_out": 0.5}
    lowered = act("ground", tiny_model, conflict, parts=1, strengths=(1.0,), n=8, goal="lower", max_perplexity=100.0)
    assert {i.site.kind: i.scale for i in lowered} == {"z": 0.5, "mlp_out": 2.0}
    table = effect(tiny_model, conflict, made, others=[], controls=1, prompting=False).tables["rows"]
    assert made.name in table["action"].to_list()
    with pytest.raises(MethodError, match="no position 'context'"):
        act("ground", tiny_model, hw.behavior("ioi", n=40), strengths=(1.0,))


# Heads that a reply hangs on ----------------------------------------------------------------------------------------


def test_ships_is_the_mean_divergence_without_the_head(tiny_model64: Any, conflict: Any) -> None:
    model, few = tiny_model64, conflict.train[:6]
    found = head_importance(model, conflict, n=6, group=2, draws=2, how="scaled", keep=0.0)
    table = found.to_frame().filter(pl.col("layer") == 1, pl.col("head") == 2)
    part = slice(2 * model.d_head, 3 * model.d_head)

    def without(_: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., part] = 0
        return (x,)

    logs: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for group in few.bind(model).groups:
        for off in (False, True):
            hook = model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(without) if off else None
            with torch.no_grad():
                logs[off].append(model.hf(group.clean).logits[:, -1].log_softmax(-1))
            if hook is not None:
                hook.remove()
    p, q = torch.cat(logs[False]), torch.cat(logs[True])
    assert table["score"][0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)
    assert found.to_frame().height == model.n_layers * model.n_heads
    assert found.group[0] == "a{layer}.h{head}".format(**found.to_frame().sort("score").row(-1, named=True))
    assert len(set(found.group)) == 2
    assert found.chart() is not None


def test_a_head_that_attends_evenly_anyway_does_not_matter(conflict: Any) -> None:
    hf: Any = tiny.tiny_llama(torch.float64, seed=3)
    hf.model.layers[1].self_attn.q_proj.weight.data[8:16] = 0  # head 1: all scores are 0
    model = hw.load(hf, tokenizer=tiny.tiny_tokenizer())
    for method in ("ships", "sahara"):
        scores = head_importance(model, conflict, n=24, group=1, draws=1, method=method).to_frame()
        own = scores.filter(pl.col("layer") == 1, pl.col("head") == 1)["score"][0]
        assert own == pytest.approx(0.0, abs=1e-5)
        assert np.max(scores["score"].to_numpy()) > 1e-3


def test_a_group_stands_beside_random_ones_and_is_judged_by_hand(tiny_model64: Any, conflict: Any) -> None:
    options = {"n": 8, "group": 2, "candidates": 3, "draws": 4, "how": "scaled", "keep": 0.0}
    for method in ("ships", "sahara"):
        found = head_importance(tiny_model64, conflict, method=method, rank=2, **options)
        parts = {"found": conflict.train[:8], "score": conflict.test[:8]}

        def replies(heads: list[str], which: str, parts: Any = parts) -> tuple[torch.Tensor, torch.Tensor]:
            groups = parts[which].bind(tiny_model64).groups
            off = [hw.zero(f"z.{head[1:]}") for head in heads]
            runs = [
                tiny_model64.run(group.clean, capture=["resid_post.2@-1"], logits="last", interventions=off)
                for group in groups
            ]
            return torch.cat([run.logits for run in runs]), torch.cat([run["resid_post.2@-1"] for run in runs])

        rows = found.tables["group"].to_dicts()
        for size, which in ((1, "found"), (2, "found"), (1, "score"), (2, "score")):
            (usual, streams), (logits, moved) = replies([], which), replies(found.group[:size], which)
            if method == "ships":
                p, q = usual.log_softmax(-1), logits.log_softmax(-1)
                by_hand = float((p.exp() * (p - q)).sum(-1).mean())
            else:
                from scipy.linalg import subspace_angles

                spaces = [np.linalg.svd(x.numpy())[0][:, :2] for x in (streams, moved)]
                by_hand = float(subspace_angles(*spaces).sum())
            assert rows[size - 1][which] == pytest.approx(by_hand, rel=1e-6)
            assert rows[size - 1]["lo"] <= rows[size - 1]["random"] <= rows[size - 1]["hi"]
        best = sorted(zip(found.to_frame()["score"], range(12), strict=True))[-1][1]
        assert found.group[0] == f"a{best // 4}.h{best % 4}"


def test_angles_between_spaces() -> None:
    one = torch.eye(5, dtype=torch.float64)[:, :2]
    turned = one.clone()
    turned[:, 0] = torch.tensor([np.cos(0.3), 0, np.sin(0.3), 0, 0])
    assert angle(one, turned) == pytest.approx(0.3, abs=1e-6)
    assert angle(one, -one[:, [1, 0]]) == pytest.approx(0.0, abs=1e-6)


# Entities that are known --------------------------------------------------------------------------------------------


def test_the_direction_of_known_entities_is_the_difference_of_means(tiny_model: Any) -> None:
    capitals = hw.behavior("capitals", n=80, seed=0)
    found = known_entities(tiny_model, capitals, sites=("resid_post.0", "resid_post.2"))
    assert found.tensors["directions"].shape == (2, tiny_model.d_model)
    bound = capitals.train.bind(tiny_model)
    streams, known = [], []
    for group in bound.groups:
        run = tiny_model.run(group.clean, capture=["resid_post.2"], logits="last")
        for row in range(len(group.rows)):
            streams.append(run["resid_post.2"][row, int(group.positions["country"][row])])
            answers = group.answers[row][group.answers[row] >= 0]
            foils = group.foils[row][group.foils[row] >= 0]
            known.append(bool(run.logits[row, answers].mean() > run.logits[row, foils].mean()))
    stack, yes = torch.stack(streams), torch.tensor(known)
    wanted = stack[yes].mean(0) - stack[~yes].mean(0)
    torch.testing.assert_close(found.tensors["directions"][1], wanted / wanted.norm(), atol=1e-4, rtol=1e-4)
    assert {"confidence", "fewer tokens", "constant"} < set(found.to_frame()["detector"])
    assert found.facts["train"]["yes"] == int(yes.sum())


def test_known_adds_the_direction_at_the_entity_only(tiny_model: Any) -> None:
    capitals = hw.behavior("capitals", n=80, seed=0)
    made = act("known", tiny_model, capitals, sites="resid_post.1", strengths=(1.0,), n=8, max_perplexity=100.0)
    (one,) = made
    assert one.positions == "country"
    group = capitals.test.bind(tiny_model).groups[0]
    plain = tiny_model.run(group.clean, capture=["resid_post.1"], logits="none")["resid_post.1"]
    run = tiny_model.run(
        group.clean, capture=["resid_post.1"], logits="none", interventions=[one], positions=group.positions
    )
    changed = (run["resid_post.1"] - plain).abs().sum(-1) > 1e-6
    assert (changed.int().argmax(1) == group.positions["country"]).all()
    assert (changed.sum(1) == 1).all()
