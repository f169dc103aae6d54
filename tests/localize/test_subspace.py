"""The dormant-pathway check on models built to have one, and on true subspaces; parts against their definitions."""

import pytest
import torch

import headwater as hw
from headwater.core.anatomy import linear_weight
from headwater.core.errors import MethodError, SiteError
from headwater.core.results import load_result
from headwater.localize.catalog import methods
from headwater.localize.comparing.subspace import subspace_check
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

LAYER = 2
SITE = f"neurons.{LAYER}"
WORDS = ["apple", "book", "box", "car", "chair", "city", "cup", "dog", "door", "field"]


@pytest.fixture(scope="module")
def behavior():
    """Eight pairs whose prompts end in one of two words."""
    rows = [
        {
            "prompt": f"The {word} and the house", "counterfactual": f"The {word} and the horse",
            "answer": " is", "foil": " are", "split": ("train", "test")[i % 2],
        }
        for i, word in enumerate(WORDS)
    ]  # fmt: skip
    return hw.Behavior.from_rows(rows)


def neurons(model, behavior):
    """(values on prompts, on counterfactuals) [n, M] at the last position."""
    site = f"{SITE}@-1"
    runs = [
        model.run(texts, capture=[site], logits="none")[site] for texts in (behavior.prompts, behavior.counterfactuals)
    ]
    return [run.double() for run in runs]


def dormant(behavior):
    """(model, direction): one unit vector that reads the two words in the nullspace of the down-projection, and writes
    along a part of the rowspace in which no prompt has anything: with it patched, the metric moves all the way."""
    hf = tiny_gpt2(torch.float64)
    model = hw.load(hf, tokenizer=tiny_tokenizer())
    clean, corrupt = neurons(model, behavior)
    projection = hf.transformer.h[LAYER].mlp.c_proj
    weight = linear_weight(projection).detach()  # [D, M]
    rows = torch.linalg.svd(weight, full_matrices=False)[2]
    # what no prompt has, within the rowspace
    seen = torch.cat([clean, corrupt]) @ rows.T @ rows
    unseen = rows - rows @ torch.linalg.pinv(seen) @ seen
    sleeping = torch.linalg.svd(unseen)[2][0]
    sleeping = sleeping @ rows.T @ rows
    sleeping = sleeping / sleeping.norm()
    assert float((torch.cat([clean, corrupt]) @ sleeping).abs().max()) < 1e-8
    mean = (clean - corrupt).mean(dim=0)
    reading = mean - mean @ rows.T @ rows
    reading = reading / reading.norm()
    ids = [tiny_tokenizer()(text)["input_ids"][0] for text in (" is", " are")]
    toward = hf.lm_head.weight[ids[0]] - hf.lm_head.weight[ids[1]]
    toward = (toward - toward.mean()).detach()
    v = (reading + sleeping) / 2**0.5
    before = projection.weight.detach().clone()

    def with_size(size: float) -> float:
        with torch.no_grad():
            projection.weight.copy_(before + size * torch.outer(sleeping, toward / toward.norm()))
        return subspace_check(model, behavior, site=SITE, directions=v, draws=0, n_test=8).effect("whole")

    low, high = -200.0, 200.0
    if with_size(high) < with_size(low):
        low, high = high, low
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if with_size(middle) < 1.0 else (low, middle)
    with_size((low + high) / 2)
    return model, v


@pytest.fixture(scope="module")
def planted(behavior):
    return dormant(behavior)


def test_a_dormant_pathway_looks_perfect_and_is_exposed(planted, behavior) -> None:
    model, v = planted
    result = subspace_check(model, behavior, site=SITE, directions=v)
    assert result.effect("whole") == pytest.approx(1.0, abs=0.05)  # as good as patching everything looks
    assert result.effect("rowspace") == pytest.approx(0.0, abs=1e-6)
    assert result.effect("nullspace") == pytest.approx(0.0, abs=1e-9)
    assert result.effect("driven by rowspace") == pytest.approx(0.0, abs=1e-6)
    assert result.effect("driven by nullspace") == pytest.approx(result.effect("whole"), abs=1e-6)
    facts = result.facts
    assert facts["null_share"] == pytest.approx(0.5, abs=0.01)
    assert facts["null_reading"] == pytest.approx(1.0, abs=1e-6)
    assert (facts["rank"], facts["nullity"], facts["map"]) == (32, 96, "weights")
    assert facts["p"] == pytest.approx(2.0 ** -facts["n"])
    assert result.verdict == "dormant pathway"
    assert "Wu et al." in facts["reply"] and "nullspace" in facts["reply"]


def test_a_direction_that_the_model_reads_passes(planted, behavior) -> None:
    model, _ = planted
    clean, corrupt = neurons(model, behavior)
    rows = torch.linalg.svd(linear_weight(model.hf.transformer.h[LAYER].mlp.c_proj).detach(), full_matrices=False)[2]
    v = (clean - corrupt).mean(dim=0) @ rows.T @ rows
    result = subspace_check(model, behavior, site=SITE, directions=v)
    assert abs(result.effect("whole")) > 0.05
    assert result.effect("rowspace") == pytest.approx(result.effect("whole"), rel=1e-6)
    assert result.facts["retained"] == pytest.approx(1.0)
    assert result.facts["null_share"] == pytest.approx(0.0, abs=1e-9)
    assert result.verdict == "connected"


def test_the_reply_has_a_point_the_mean_difference_has_a_null_part_too(planted, behavior) -> None:
    """A plain difference of means is read by the model and has most of its length in the nullspace all the same."""
    result = subspace_check(planted[0], behavior, site=SITE)
    assert 0.1 < result.facts["null_share"] < 0.99
    assert result.tensors["directions"].shape == (1, 128)
    assert result.effect("site") != pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["neurons.1", "resid_post.1", "mlp_out.0", "z.1.h2", "attn_out.1@-1", "resid_pre.2@3"])
def test_parts_are_patches_by_their_definition(site: str, direction: str) -> None:
    model = hw.load(tiny_llama(torch.float64), tokenizer=tiny_tokenizer())
    pairs = hw.behavior("ioi", n=16, seed=2)
    where = site if "@" in site else f"{site}@-1"
    test = pairs.test.bind(model)
    width = model.run(test.groups[0].clean, capture=[where], logits="none")[where].shape[-1]
    v = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = subspace_check(model, pairs, site=site, directions=v, direction=direction, draws=2)
    values, at = [], []
    for group in test.groups:
        into, source = (group.corrupt, group.clean) if direction == "denoise" else (group.clean, group.corrupt)
        run = model.run(source, capture=[where], logits="none")
        patched = model.run(into, logits="last", interventions=[hw.swap_subspace(where, run, v)]).logits
        values.append(patched.gather(1, group.answers)[:, 0] - patched.gather(1, group.foils)[:, 0])
        at += group.rows
    torch.testing.assert_close(result.tensors["values"][0], torch.cat(values).double(), rtol=1e-9, atol=1e-9)
    facts = result.facts
    assert facts["rank"] + facts["nullity"] == width
    q, row, null = (result.tensors[name] for name in ("directions", "rowspace", "nullspace"))
    torch.testing.assert_close(q @ q.T, torch.eye(2, dtype=torch.float64))
    if len(row) and len(null):
        torch.testing.assert_close(
            row @ null.T, torch.zeros(len(row), len(null), dtype=torch.float64), rtol=0, atol=1e-9
        )
    if site.startswith("z"):
        assert facts["nullity"] == 0 and result.facts["retained"] == pytest.approx(1.0)
    if site.startswith("neurons"):
        assert result.effect("nullspace") == pytest.approx(0.0, abs=1e-9)


def test_of_the_last_stream_only_what_the_unembedding_tells_apart_is_read() -> None:
    """After the last block the map is the final norm and the unembedding: a direction that the metric cannot see, to
    first order, is found disconnected where the map is the metric's own."""
    model = hw.load(tiny_llama(torch.float64), tokenizer=tiny_tokenizer())
    pairs = hw.behavior("ioi", n=12, seed=2)
    site = "resid_post.2"
    full = subspace_check(model, pairs, site=site, probes=0, energy=1.0, draws=0)
    assert full.facts["map"] == "jacobian" and full.facts["rank"] <= 12
    null = subspace_check(model, pairs, site=site, probes=0, energy=1.0, draws=0, directions=full.tensors["nullspace"])
    assert abs(null.effect("whole")) < 0.5 * abs(full.effect("whole"))
    assert null.facts["null_share"] == pytest.approx(1.0)


def test_it_is_registered_and_comes_back_from_disk(planted, behavior, tmp_path) -> None:
    assert methods.get("subspace_check") is subspace_check
    result = subspace_check(planted[0], behavior, site=SITE, draws=1)
    result.save(tmp_path / "r")
    assert load_result(tmp_path / "r").content_hash == result.content_hash
    with pytest.raises(MethodError, match="no such part"):
        result.effect("hole")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"site": "pattern.1.h0"}, MethodError, "cannot check"),
        ({"site": "z.1"}, MethodError, "cannot check"),
        ({"site": "neurons.99"}, SiteError, "no layer"),
        ({"site": SITE, "keep": 1.5}, MethodError, "shares"),
        ({"site": SITE, "direction": "up"}, MethodError, "direction"),
        ({"site": SITE, "directions": torch.ones(1, 5)}, MethodError, "do not fit"),
        ({"site": SITE, "directions": torch.zeros(1, 128)}, MethodError, "all zero"),
        ({"site": "resid_post.1", "metric": "accuracy"}, MethodError, "no gradient"),
        ({"site": f"{SITE}@0"}, MethodError, "do not differ"),
    ],
)
def test_what_makes_no_sense_is_refused(planted, behavior, options, error, says) -> None:
    with pytest.raises(error, match=says):
        subspace_check(planted[0], behavior, **options)
