"""The architecture that programs are compiled into: a pre-norm decoder without the norms.

Learned positions, ReLU, softmax attention through transformers' attention interface (so every tool that reads attention
there reads it here), biases, an unembedding of its own. No norm, because a compiled program counts on exact sums.
`is_causal=False` lets every position look at every other, as RASP does. It is a plain `PreTrainedModel`: importing this
module makes it known to transformers' Auto classes; `headwater.load` does so by itself. No code travels with weights.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


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


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)) * kwargs.get("scaling", 1.0)
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = nn.functional.softmax(scores, dim=-1)
    return torch.matmul(pattern, value).transpose(1, 2), pattern


class PlainAttention(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = config.is_causal
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, inner)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.o_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(self.config._attn_implementation), eager_attention_forward)
        mixed, pattern = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=1.0, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()), pattern


class PlainMLP(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = nn.ReLU()
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class PlainBlock(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.attn = PlainAttention(config)
        self.mlp = PlainMLP(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        added, _ = self.attn(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + added
        return hidden_states + self.mlp(hidden_states)


class PlainForCausalLM(PreTrainedModel):
    """A plain transformer with an unembedding; `logits` [B, T, V]: at each position its own answer."""

    config_class = PlainConfig
    config: PlainConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["PlainBlock"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": PlainBlock}

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

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
        """Logits at every position (or the last `logits_to_keep`); `labels` [B, T] are answers at their own positions.

        Keeps no cache: where attention is not causal, a prefix has no keys and values of its own.
        """
        if past_key_values is not None:
            raise ValueError("PlainForCausalLM keeps no key/value cache; pass the whole sequence")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        places = torch.arange(x.shape[1], device=x.device)
        x = x + self.embed_positions(places)[None]
        make_mask = create_causal_mask if self.config.is_causal else create_bidirectional_mask
        mask = make_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=None)
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register(PlainConfig.model_type, PlainConfig, exist_ok=True)
AutoModelForCausalLM.register(PlainConfig, PlainForCausalLM, exist_ok=True)
