"""TransformerLens' HookedTransformer architecture as a transformers model: what InterpBench's weights need to run
exactly.

Its models may have no norm, an unembedding with a bias and answers of a vocabulary of their own, which no architecture
of transformers has. Weights are laid out as transformers lays them out; importing this module makes the architecture
known to the Auto classes.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput

from headwater.bench.decoder import Decoder, DecoderAttention, DecoderMLP


class HookedConfig(PreTrainedConfig):
    """Sizes. `norm`: layer norms before each part and at the end. `answer_size`: width of the logits."""

    model_type = "headwater_hooked"

    vocab_size: int = 8
    answer_size: int = 8
    hidden_size: int = 16
    intermediate_size: int = 16
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    head_dim: int = 16
    max_position_embeddings: int = 16
    hidden_act: str = "gelu"
    norm: bool = True
    layer_norm_eps: float = 1e-5
    attention_scale: float = 1.0
    is_causal: bool = True
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False


def _norm(config: HookedConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class HookedBlock(nn.Module):
    def __init__(self, config: HookedConfig) -> None:
        super().__init__()
        if config.norm:  # where there is none the parts read the stream itself
            self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)
        self.norm = config.norm
        self.self_attn = DecoderAttention(config, scaling=config.attention_scale)
        self.mlp = DecoderMLP(config, ACT2FN[config.hidden_act])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        entering = self.input_layernorm(hidden_states) if self.norm else hidden_states
        added, _ = self.self_attn(entering, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + added
        entering = self.post_attention_layernorm(hidden_states) if self.norm else hidden_states
        return hidden_states + self.mlp(entering)


class HookedForCausalLM(Decoder):
    """`logits` [B, T, answer_size]."""

    config_class = HookedConfig
    config: HookedConfig
    _no_split_modules: ClassVar[list[str]] = ["HookedBlock"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": HookedBlock}

    def __init__(self, config: HookedConfig) -> None:
        super().__init__(config, HookedBlock, config.answer_size, _norm(config) if config.norm else None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits at every position, or the last `logits_to_keep`."""
        logits = self.answered(input_ids, attention_mask, inputs_embeds, past_key_values, logits_to_keep)
        return CausalLMOutput(logits=logits)


AutoConfig.register(HookedConfig.model_type, HookedConfig, exist_ok=True)
AutoModelForCausalLM.register(HookedConfig, HookedForCausalLM, exist_ok=True)
