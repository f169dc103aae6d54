"""The same numbers as two independent libraries, where they are installed (`pip install -e '.[bench]'`)."""

import importlib
import warnings
from typing import Any

import pytest
import torch
import transformers

import headwater as hw
from headwater.core.model import Model

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def peer(name: str) -> Any:
    """The module, or a skipped test. Warnings of its own are not ours to mend."""
    warnings.simplefilter("ignore")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not to be had here: {error}")


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore")
def test_nnsight() -> None:
    nnsight = peer("nnsight")
    hf = gpt2()
    model = Model(hf)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    names = ["resid_post.0", "attn_out.1", "mlp_out.2", "resid_post.2", "z.1"]
    plain = model.run(IDS, capture=names)
    changed = model.run(IDS, capture=names, interventions=[hw.add("resid_post.0@-1", vector), hw.zero("z.1.h2")])
    theirs = nnsight.NNsight(hf)
    with torch.no_grad(), theirs.trace(input_ids=IDS):
        first = theirs.transformer.h[0].output.save()
        attention = theirs.transformer.h[1].attn.output[0].save()
        mlp = theirs.transformer.h[2].mlp.output.save()
        logits = theirs.lm_head.output.save()
    for name, value in (("resid_post.0", first), ("attn_out.1", attention), ("mlp_out.2", mlp)):
        value = value[0] if isinstance(value, tuple) else value
        assert torch.equal(plain[name], value), name
    assert torch.equal(plain.logits, logits)
    with torch.no_grad(), theirs.trace(input_ids=IDS):
        out = theirs.transformer.h[0].output
        stream = out[0] if isinstance(out, tuple) else out
        stream[:, -1] += vector
        theirs.transformer.h[1].attn.c_proj.input[..., 16:24] = 0
        logits = theirs.lm_head.output.save()
    assert float((changed.logits - logits).abs().max()) < 1e-5
    assert float((changed.logits - plain.logits).abs().max()) > 1e-2


@pytest.mark.filterwarnings("ignore")
def test_transformer_lens() -> None:
    lens = peer("transformer_lens")
    hf = gpt2()
    model = Model(hf)
    config = lens.HookedTransformerConfig(
        n_layers=3,
        d_model=32,
        n_heads=4,
        d_head=8,
        d_mlp=128,
        n_ctx=64,
        d_vocab=61,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=1e-5,
    )
    theirs = lens.HookedTransformer(config)
    convert = importlib.import_module("transformer_lens.pretrained.weight_conversions").convert_gpt2_weights
    theirs.load_state_dict(convert(hf, config), strict=False)
    logits, cache = theirs.run_with_cache(IDS)
    names = [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_mid",
        "blocks.2.hook_resid_post",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_k",
        "blocks.1.attn.hook_v",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_pattern",
        "blocks.1.mlp.hook_post",
    ]
    run = model.run(IDS, capture=names)
    for name in names:
        assert float((run[name] - cache[name]).abs().max()) < 1e-4, name
    assert float((run.logits - logits).abs().max()) < 1e-4

    def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[:, :, 2] = 0
        return value

    for hook, site in (("blocks.1.attn.hook_z", "z.1.h2"), ("blocks.0.attn.hook_z", "head.0.h2")):
        wanted = theirs.run_with_hooks(IDS, fwd_hooks=[(hook, zero)])
        found = model.run(IDS, interventions=[hw.zero(site)]).logits
        assert float((found - wanted).abs().max()) < 1e-4
        assert float((wanted - logits).abs().max()) > 1e-2
