"""Anatomies: what a model lacks is said by name, and what its structure says is measured."""

from typing import Any

import pytest
import torch
from torch import nn

from headwater.core.anatomy import find_anatomy, is_norm, linear_weight
from headwater.core.anatomy.trace import device_of, probe_inputs, trace
from headwater.core.errors import ModelError, SiteError
from headwater.core.model import Model
from tests.core.families import build


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("gpt2", "sequential"),
        ("gpt_neox", "parallel"),
        ("gptj", "parallel"),
        ("phi", "parallel"),
        ("neox_sequential", "sequential"),
        ("stablelm_parallel", "parallel"),
        ("gemma2", "sequential"),
        ("olmo2", "sequential"),
        ("bert", "post_norm"),
        ("opt_post_norm", "post_norm"),
        ("mamba", "mixer"),
    ],
)
def test_how_a_block_shares_its_stream(family: str, order: str) -> None:
    anatomy = find_anatomy(build(family))
    assert {block.order for block in anatomy.main.blocks} == {order}
    assert len(anatomy.main) == 3 and anatomy.main.d_model == 32


@pytest.mark.parametrize(
    ("family", "site", "reason"),
    [
        ("gpt_neox", "resid_mid.0", "side by side"),
        ("phi", "resid_mid.0", "side by side"),
        ("mamba", "z.0", "mixer_in"),
        ("mamba", "resid_mid.0", "mixer_in"),
        ("llama", "cross_z.0", "kinds:"),
        ("vit", "encoder/z.0", "without a prefix"),
        ("t5", "encoder/cross_z.0", "kinds:"),
        ("clip", "logits", "kinds:"),
    ],
)
def test_what_a_model_lacks_is_said(family: str, site: str, reason: str) -> None:
    model = Model(build(family))
    with pytest.raises(SiteError, match=f"(?s)no s.*{reason}"):
        model.run(probe_inputs(model.hf), capture=site)


def test_grouped_heads_are_as_they_are() -> None:
    model = Model(build("qwen3"))
    assert (model.n_heads, model.n_kv_heads, model.d_head, model.d_model, model.d_vocab) == (4, 2, 8, 32, 61)
    run = model.run([[5, 6, 7]], capture=["k.0", "v.0", "q.0", "z.0"])
    assert run["k.0"].shape == run["v.0"].shape == (1, 3, 2, 8)
    assert run["q.0"].shape == run["z.0"].shape == (1, 3, 4, 8)


def test_multipliers_are_found() -> None:
    part = find_anatomy(build("granite")).main.blocks[1]
    assert part.attention is not None and part.mlp is not None
    assert part.attention.write.scale == part.mlp.write.scale == 0.22


def test_several_stacks_have_prefixes() -> None:
    t5 = Model(build("t5"))
    assert set(t5.anatomy.stacks) == {"encoder", "decoder"} and t5.anatomy.main.prefix == "decoder"
    assert [str(s) for s in t5.resolve("z.1")] == ["decoder/z.1"]
    assert {s.stack for s in t5.sites("*/cross_z.*")} == {"decoder"}
    assert set(find_anatomy(build("clip")).stacks) == {"text", "vision"}


def test_a_model_without_blocks_is_refused() -> None:
    class Config:
        vocab_size, is_encoder_decoder = 11, False

    class Flat(nn.Module):
        config = Config()
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 11)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(input_ids))

    with pytest.raises(ModelError, match="no run of blocks in Flat"):
        Model(Flat())


def test_finding_leaves_the_model_as_it_was() -> None:
    hf = build("gptj")
    hf.train()
    names = {name: dict(module.__dict__) for name, module in hf.named_modules()}
    find_anatomy(hf)
    assert hf.training
    for name, module in hf.named_modules():
        assert module.__dict__.keys() == names[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_trace_nests(model_name: str = "gpt2") -> None:
    hf = build(model_name)
    found = trace(hf, probe_inputs(hf))
    block = next(call for call in found.calls if call.name == "transformer.h.1")
    inner = {call.name for call in found.within(block)}
    assert "transformer.h.1.attn.c_proj" in inner and "transformer.h.0.attn" not in inner
    assert len(found.attention) == 3


def test_small_questions() -> None:
    conv: Any = build("gpt2").transformer.h[0].attn.c_proj
    x = torch.randn(2, conv.weight.shape[0], dtype=torch.float64)
    assert torch.allclose(conv(x), x @ linear_weight(conv).T + conv.bias)
    assert is_norm(nn.LayerNorm(3)) and not is_norm(nn.Identity()) and not is_norm(nn.Linear(2, 2))
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
