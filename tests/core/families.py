"""Tiny random models of every family that headwater says it supports: name -> factory of a transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
MOE: dict[str, Any] = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}


def _clip() -> Any:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 61, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=64)
    ),
    "gptj": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL, intermediate_size=48, max_position_embeddings=64)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=8)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    ),
    "olmo": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**GROUPED)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED)),
    "stablelm": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**GROUPED)),
    "granite": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(
            **GROUPED, residual_multiplier=0.22, embedding_multiplier=12.0, attention_multiplier=0.1, logits_scaling=8.0
        )
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**MOE, head_dim=8, sliding_window=8)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(
            **SMALL,
            intermediate_size=48,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=61,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=61,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    ),
    "clip": _clip,
}
"""The 25 families of the promise."""

MORE: dict[str, Callable[[], Any]] = {
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=3, state_size=4)
    ),
    "opt_post_norm": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            **SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False
        )
    ),
    "neox_sequential": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, use_parallel_residual=False)
    ),
    "stablelm_parallel": lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**GROUPED, use_parallel_residual=True)),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A seeded random model; weights are made large enough that every part matters."""
    torch.manual_seed(0)
    hf = (FAMILIES | MORE)[name]().to(dtype).eval()
    if dtype == torch.float64 and hasattr(hf.config, "_experts_implementation"):
        hf.config._experts_implementation = "eager"  # the fused kernels know no float64
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.add_(noise * (0.15 if parameter.ndim > 1 else 0.1))
    return hf
