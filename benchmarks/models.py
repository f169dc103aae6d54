"""The models measured: SmolLM2-135M, and a GPT-2-small with random weights (also as transformer-lens has it)."""

from __future__ import annotations

from typing import Any

import torch


def smollm2() -> Any:
    """SmolLM2-135M in float32, a model object of its own at each call."""
    import headwater as hw

    return hw.load("smollm2")


def smollm2_folder() -> str:
    """Where its cached weights lie, for libraries that take a name."""
    return str(smollm2().hf.config._name_or_path)


def gpt2_small(seed: int = 0) -> Any:
    """A GPT-2-small with random weights, larger than its initialization so that attention is not flat."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim == 2 and ".h." in name:
                parameter.mul_(2.0)
    return hf


def tiny_llama(layers: int = 12) -> Any:
    """Layers so small that what is measured is the cost of the hooks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def hooked_gpt2(hf: Any, **config: Any) -> Any:
    """The same GPT-2 as transformer-lens' HookedTransformer, weights unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head,
        d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", eps=c.layer_norm_epsilon, device="cpu",
        dtype=hf.dtype, original_architecture="GPT2LMHeadModel", **config,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict({k: v.clone() for k, v in convert_gpt2_weights(hf, cfg).items()}, strict=False)
    return model.eval()
