"""What the house's own architectures share: a decoder with learned positions and biases, whose attention goes through
transformers' attention interface, so that every tool that reads attention there reads it here. `plain.py` and
`siit/hooked.py` say what stands in a block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)) * kwargs.get("scaling", 1.0)
    pattern = nn.functional.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    return torch.matmul(pattern, value).transpose(1, 2), pattern


class DecoderAttention(nn.Module):
    """Heads of any width, with biases. scaling: of the scores."""

    def __init__(self, config: Any, scaling: float) -> None:
        super().__init__()
        self.config, self.head_dim, self.is_causal, self.scaling = config, config.head_dim, config.is_causal, scaling
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, inner)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.o_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(self.config._attn_implementation), eager_attention_forward)
        mixed, pattern = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()), pattern


class DecoderMLP(nn.Module):
    """Up, an activation, down; with biases."""

    def __init__(self, config: Any, activation: nn.Module) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = activation
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class Decoder(PreTrainedModel):
    """Embeddings, blocks of one kind, an optional norm, an unembedding of its own. `is_causal=False` in the config lets
    every position look at every other. Keeps no cache: where attention is not causal, a prefix has no keys and values
    of its own.
    """

    base_model_prefix = ""
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(
        self, config: Any, block: Callable[[Any], nn.Module], answers: int, norm: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        if norm is not None:
            self.final_norm = norm
        self.lm_head = nn.Linear(config.hidden_size, answers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def answered(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Any,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """Logits [B, T, answers] at every position, or the last `logits_to_keep`."""
        if past_key_values is not None:
            raise ValueError(f"{type(self).__name__} keeps no key/value cache; pass the whole sequence")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + self.embed_positions(torch.arange(x.shape[1], device=x.device))[None]
        make_mask = create_causal_mask if self.config.is_causal else create_bidirectional_mask
        mask = make_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=None)
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        x = self.final_norm(x) if hasattr(self, "final_norm") else x
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.lm_head(x[:, keep])
