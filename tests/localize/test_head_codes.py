"""Codes of heads find heads that were planted by hand, find nothing where there is nothing, and count as they say."""

import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

import headwater as hw
import tiny
from headwater.core.errors import MethodError
from headwater.localize.search.head_codes import (
    NONE,
    HeadCodesConfig,
    class_scores,
    engagement,
    head_codes,
    judge,
    pair_scores,
    presence,
    train_coder,
)

MARKER, HEADS, WIDTH = "station", 8, 64
PLANTED = {(0, 2), (0, 5), (1, 1), (1, 6)}
WORDS = [word for word in (Path(__file__).parents[1] / "words.txt").read_text().split() if word.islower()][:60]


def planted_model(tokenizer: Any) -> Any:
    """Two layers of heads that average what they read. Planted heads read one word (in layer 0) or what the planted
    heads below wrote (in layer 1) far more strongly than anything else.
    """
    hf: Any = tiny.tiny_gpt2(n_layer=2, n_head=HEADS, n_embd=WIDTH)
    k = WIDTH // HEADS
    generator = torch.Generator().manual_seed(3)
    told = torch.randn(WIDTH, generator=generator)
    told = (told - told.mean()) / (told - told.mean()).norm()
    marker = hf.transformer.wte.weight.data[tokenizer(" " + MARKER)["input_ids"][0]]
    marker = (marker - marker.mean()) / (marker - marker.mean()).norm()
    hf.transformer.wpe.weight.data.zero_()
    for layer, block in enumerate(hf.transformer.h):
        weight = block.attn.c_attn.weight.data
        weight[:, : 2 * WIDTH] = 0  # no query, no key: attention is even
        block.attn.c_proj.weight.data *= 0.2
        block.mlp.c_proj.weight.data *= 0.2
        reads = marker if layer == 0 else told
        for head in (h for at, h in PLANTED if at == layer):
            columns = slice(2 * WIDTH + head * k, 2 * WIDTH + (head + 1) * k)
            way = torch.randn(k, generator=generator)
            weight[:, columns] *= 0.3
            weight[:, columns] += 4 * torch.outer(reads, way / way.norm())
            block.attn.c_proj.weight.data[head * k : (head + 1) * k] += torch.outer(way / way.norm(), told)
    return hw.load(hf, tokenizer=tokenizer)


def behavior(folder: Path, *, marked: bool, n: int = 16, seed: int = 0) -> Any:
    """Prompts of random words, one of them the marker; their counterfactuals have another word there."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        *words, other, ours = rng.sample([word for word in WORDS if word != MARKER], 10)
        place = rng.randrange(2, 7)

        def said(word: str, words: list[str] = words, place: int = place) -> str:
            return "The " + " ".join([*words[:place], word, *words[place + 1 :]])

        answer, foil = rng.sample(WORDS, 2)
        rows.append(
            {
                "prompt": said(MARKER if marked else ours), "counterfactual": said(other),
                "answers": f" {answer}", "foils": f" {foil}",
            }
        )  # fmt: skip
    path = folder / f"marked-{marked}-{seed}.csv"
    pl.DataFrame(rows).write_csv(path)
    return hw.behavior(str(path))


def auc(scores: Tensor, truth: list[bool]) -> float:
    """The chance that a planted head scores above another one."""
    ours = [float(s) for s, t in zip(scores, truth, strict=True) if t]
    rest = [float(s) for s, t in zip(scores, truth, strict=True) if not t]
    return sum((a > b) + 0.5 * (a == b) for a in ours for b in rest) / (len(ours) * len(rest))


@pytest.fixture(scope="module")
def model() -> Any:
    return planted_model(tiny.tiny_tokenizer())


def test_planted_heads_are_found_from_eight_examples(model: Any, tmp_path: Path) -> None:
    result: Any = head_codes(model, behavior(tmp_path, marked=True))
    heads: Any = result.tables["heads"]
    truth = [(row["layer"], row["head"]) in PLANTED for row in heads.to_dicts()]
    assert auc(torch.tensor(heads["score"].to_list()), truth) > 0.9
    assert auc(-torch.tensor(heads["p"].to_list()), truth) > 0.9
    assert heads.filter(pl.Series(truth))["p"].max() <= 0.1
    # heads of layer 1 that were not planted read what the planted wrote too, but those of layer 0 cannot
    assert (
        heads.filter(~pl.Series(truth) & (pl.col("layer") == 0))["score"].max()
        < heads.filter(pl.Series(truth) & (pl.col("layer") == 0))["score"].min()
    )
    pairs = result.tables["pairs"]
    assert set(pairs.head(4)["source"]) <= {"a0.h2", "a0.h5"}
    assert all(source[1] == "0" and target[1] == "1" for source, target in pairs.select("source", "target").rows())
    circuit = result.circuit(edges=60)
    assert {f"a{a}.h{h}" for a, h in PLANTED} <= set(circuit.nodes)
    each = head_codes(model, behavior(tmp_path, marked=True), positions="each").tables["heads"]["score"]
    assert auc(torch.tensor(each.to_list()), truth) > 0.7


def test_where_nothing_sets_them_apart_no_head_stands_out(model: Any, tmp_path: Path) -> None:
    """Over several random behaviors, p is small no oftener than by chance and planted heads rank as any."""
    small, ranks = 0, []
    for seed in range(4):
        heads: Any = head_codes(model, behavior(tmp_path, marked=False, seed=seed), steps=150).tables["heads"]
        truth = [(row["layer"], row["head"]) in PLANTED for row in heads.to_dicts()]
        ranks.append(auc(torch.tensor(heads["score"].to_list()), truth))
        small += int((heads["p"] <= 0.05).sum())
    assert small <= 8  # of 64; .05 of them are 3.2
    assert 0.25 < sum(ranks) / len(ranks) < 0.75


def test_codes_do_what_they_say() -> None:
    config = HeadCodesConfig(codes=16, steps=200, sparsity=0.05)
    generator = torch.Generator().manual_seed(0)
    ways = torch.eye(8)[:4]
    which = torch.randint(4, (400,), generator=generator)
    x = ways[which] * 3 + torch.randn(400, 8, generator=generator) * 0.05
    before = torch.random.get_rng_state()
    coder, again = train_coder(x, config), train_coder(x, config)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(coder.encoder, again.encoder) and coder.error < 0.1 and coder.active < 8
    codes = coder.codes(x)
    by_way = [set(codes[which == way].tolist()) for way in range(4)]
    assert sum(len(a & b) for i, a in enumerate(by_way) for b in by_way[:i]) == 0  # no code for two things
    silent = type(coder)(coder.encoder, torch.full((16,), -100.0), 0.0, 0.0)
    assert silent.codes(x).unique().tolist() == [NONE]


def test_scores_by_hand() -> None:
    # 2 pairs, 2 tokens, 2 heads: head 0 uses code 0 on prompts and 1 on counterfactuals, head 1 always 2, or nothing
    codes = torch.tensor([[[0, 2], [0, NONE]], [[0, 2], [2, 2]], [[1, 2], [1, NONE]], [[1, 2], [2, 2]]])
    present = presence(codes, 3)
    assert present.int().tolist()[1] == [[1, 0, 1], [0, 0, 1]]
    assert class_scores(present).tolist() == pytest.approx([2 / 3, 0.0])
    assert pair_scores(present).tolist() == pytest.approx([(1 + 2 / 3) / 2, 0.0])
    assert engagement(present).tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    scores, null, p = judge(present, HeadCodesConfig(draws=400))
    # of two pairs, half the relabelings are the labels or their exchange; the others make the shares equal
    assert null.tolist() == pytest.approx([1 / 3, 0.0], abs=0.05)
    assert p.tolist() == pytest.approx([0.5, 1.0], abs=0.08)
    assert scores.tolist() == pytest.approx([2 / 3, 0.0])
    pair = judge(present, HeadCodesConfig(contrast="pair"))
    assert bool(pair[2].isnan().all()) and pair[1].tolist() == [0.0, 0.0]


def test_as_users_call_it(tiny_model: Any, tmp_path: Path) -> None:
    ioi = hw.behavior("ioi", n=24, seed=0)
    result: Any = hw.localize.methods.get("head_codes")(tiny_model, ioi, steps=20, contrast="pair")
    assert result.facts["n"] == 10 and result.facts["passes"] == {"forward": 20.0, "backward": 0.0}
    assert result.tables["heads"].height == tiny_model.n_layers * tiny_model.n_heads
    assert list(result.tensors["codes"].shape) == [20, 1, 12]
    graph = result.graph
    assert not bool(result.scores[~graph.allowed].any()) and bool(torch.isfinite(result.scores).all())
    assert result.top(3).height == 3 and result.top(3)["score"].null_count() == 0
    result.save(tmp_path / "r")
    back: Any = hw.load_result(tmp_path / "r", check=True)
    assert back.content_hash == head_codes(tiny_model, ioi, steps=20, contrast="pair").content_hash
    assert result.circuit(edges=60).faithfulness(ioi.test[:3]).facts["n"] == 3
    assert back.chart().to_dict()


def test_what_does_not_fit_is_refused(tiny_model: Any) -> None:
    with pytest.raises(MethodError, match="2 examples"):
        HeadCodesConfig(examples=1)
    with pytest.raises(MethodError, match="contrast: Input should be"):
        head_codes(tiny_model, hw.behavior("ioi", n=8), contrast="classes")
