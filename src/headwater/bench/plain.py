"""The architecture that programs are compiled into: a pre-norm decoder without the norms.

Learned positions, ReLU, softmax attention through transformers' attention interface (so every tool that reads attention
there reads it here), biases, an unembedding of its own. No norm, because a compiled program counts on exact sums.
`is_causal=False` lets every position look at every other, as RASP does. It is a plain `PreTrainedModel`: importing this
module makes it known to transformers' Auto classes; `headwater.load` does so by itself. No code travels with weights.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from headwater.bench.decoder import Decoder, DecoderAttention, DecoderMLP


class PlainConfig(PreTrainedConfig):
    """Sizes of a plain transformer. `is_causal`: no position looks at a later one."""

    model_type = "headwater_plain"

    vocab_size: int = 8
    hidden_size: int = 16
    intermediate_size: int = 16
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    head_dim: int = 8
    max_position_embeddings: int = 8
    is_causal: bool = False
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False


class PlainBlock(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.attn = DecoderAttention(config, scaling=1.0)
        self.mlp = DecoderMLP(config, nn.ReLU())

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        added, _ = self.attn(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + added
        return hidden_states + self.mlp(hidden_states)


class PlainForCausalLM(Decoder):
    """A plain transformer with an unembedding; `logits` [B, T, V]: at each position its own answer."""

    config_class = PlainConfig
    config: PlainConfig
    _no_split_modules: ClassVar[list[str]] = ["PlainBlock"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": PlainBlock}

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config, PlainBlock, config.vocab_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits at every position (or the last `logits_to_keep`); `labels` [B, T] are answers at their own
        positions."""
        logits = self.answered(input_ids, attention_mask, inputs_embeds, past_key_values, logits_to_keep)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(PlainConfig.model_type, PlainConfig, exist_ok=True)
AutoModelForCausalLM.register(PlainConfig, PlainForCausalLM, exist_ok=True)
