"""Copy suppression and succession: planted heads are found, and the logits are those of the weights by hand."""

import pytest
import torch

import headwater as hw
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.dynamics.measures import Probe, measures
from headwater.dynamics.measures.writes import _single, _usable, direct_logits
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


def numbers(name: str, model: Model) -> dict[str, float]:
    return {row["name"]: row["value"] for row in measures.get(name)(Probe(model, 0))}


def one_head(values: torch.Tensor) -> Model:
    """Two layers of GPT-2, one head each as wide as the stream; in the second it writes `values` of what it reads."""
    model = hw.load(tiny_gpt2(n_layer=2, n_head=1, n_embd=128), tokenizer=tiny_tokenizer())
    with torch.no_grad():  # after loading: the anatomy is measured on weights that write something
        for block in model.hf.transformer.h:
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.zero_()
        first, second = (block.attn for block in model.hf.transformer.h)
        first.c_proj.weight.zero_()
        second.c_attn.weight[:, 256:] = torch.eye(128)
        second.c_proj.weight.copy_(values)
        model.hf.transformer.wpe.weight.zero_()
    return model


def test_a_head_that_writes_against_what_it_reads() -> None:
    against, along = (numbers("copy_suppression", one_head(sign * torch.eye(128))) for sign in (-1.0, 1.0))
    assert against["a1.h0"] == against["max"] > 0.7  # random embeddings are not quite orthogonal
    assert along["a1.h0"] == 0.0


def test_random_heads_suppress_at_chance() -> None:
    found = numbers("copy_suppression", hw.load(tiny_llama(), tokenizer=tiny_tokenizer()))
    found.pop("max")
    assert len(found) == 12 and 0.0 < sum(found.values()) / 12 < 0.15


def test_a_head_that_writes_the_successor() -> None:
    model = one_head(torch.zeros(128, 128))
    days = [model.tokenizer(" " + day)["input_ids"][0] for day in ("one", "two", "three", "four", "five", "six")]
    weight = model.hf.transformer.wte.weight.detach()
    seen = torch.nn.functional.layer_norm(weight[days], (128,))
    # the map that takes each of the six, as the head reads it, to the next, by least squares
    wanted = weight[days[1:]] - weight[days].mean(dim=0)
    with torch.no_grad():
        model.hf.transformer.h[1].attn.c_proj.weight.copy_(torch.linalg.pinv(seen[:-1]) @ wanted)
    known = _single(model, ["one", "two", "three", "four", "five", "six"])
    assert known.tolist() == days
    logits = direct_logits(model, known, known)[1][0]
    assert logits[:-1].argmax(dim=1).tolist() == [1, 2, 3, 4, 5]


def test_logits_are_those_of_the_weights() -> None:
    """By hand for Llama in float64: W_U times the norm's derivative times W_O W_V of the normed effective embedding."""
    hf = tiny_llama(torch.float64)
    model = hw.load(hf, tokenizer=tiny_tokenizer())
    tokens, candidates = torch.tensor([5, 70, 300]), torch.tensor([3, 70, 9, 200])
    found = direct_logits(model, tokens, candidates)
    usable = _usable(model)
    before = usable[torch.randint(len(usable), (3,), generator=torch.Generator().manual_seed(0))]
    run = model.run(torch.stack([before, tokens], 1), capture=["resid_post.0", "resid_post.2"], logits="none")
    effective, final = run["resid_post.0"][:, 1].clone(), run["resid_post.2"][:, 1].clone()
    block = hf.model.layers[2]
    normed = block.input_layernorm(effective)
    value = (normed @ block.self_attn.v_proj.weight.T).view(3, 2, 8)[:, 3 // 2]  # head 3 reads the second group
    written = value @ block.self_attn.o_proj.weight[:, 24:32].T
    size = final.square().mean(dim=1, keepdim=True) + hf.model.norm.variance_epsilon
    along = (final * written).mean(dim=1, keepdim=True) / size
    moved = hf.model.norm.weight * (written - final * along) / size.sqrt()
    by_hand = (moved @ hf.lm_head.weight[candidates].T).detach()
    assert torch.allclose(found[2][3], by_hand.float(), rtol=2e-3, atol=1e-4)


def test_what_has_no_series_is_refused() -> None:
    model = hw.load(tiny_gpt2())
    with pytest.raises(MethodError, match="no known series"):
        measures.get("successor")(Probe(model, 0))
