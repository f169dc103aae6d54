"""TransformerLens' HookedTransformer architecture as a transformers model: what InterpBench's weights need to run
exactly.

Its models may have no norm, an unembedding with a bias and answers of a vocabulary of their own, which no architecture
of transformers has. Weights are laid out as transformers lays them out; importing this module makes the architecture
known to the Auto classes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


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


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)) * kwargs.get("scaling", 1.0)
    pattern = nn.functional.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    return torch.matmul(pattern, value).transpose(1, 2), pattern


class HookedAttention(nn.Module):
    def __init__(self, config: HookedConfig) -> None:
        super().__init__()
        self.config, self.head_dim, self.is_causal = config, config.head_dim, config.is_causal
        self.scaling = config.attention_scale
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


class HookedMLP(nn.Module):
    def __init__(self, config: HookedConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


def _norm(config: HookedConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm else nn.Identity()


class HookedBlock(nn.Module):
    def __init__(self, config: HookedConfig) -> None:
        super().__init__()
        if config.norm:  # where there is none the parts read the stream itself
            self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)
        self.norm = config.norm
        self.self_attn = HookedAttention(config)
        self.mlp = HookedMLP(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        entering = self.input_layernorm(hidden_states) if self.norm else hidden_states
        added, _ = self.self_attn(entering, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + added
        entering = self.post_attention_layernorm(hidden_states) if self.norm else hidden_states
        return hidden_states + self.mlp(entering)


class HookedForCausalLM(PreTrainedModel):
    """`logits` [B, T, answer_size]."""

    config_class = HookedConfig
    config: HookedConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["HookedBlock"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": HookedBlock}

    def __init__(self, config: HookedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(HookedBlock(config) for _ in range(config.num_hidden_layers))
        if config.norm:
            self.final_norm = _norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.answer_size)
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
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits at every position, or the last `logits_to_keep`. Keeps no cache."""
        if past_key_values is not None:
            raise ValueError("HookedForCausalLM keeps no key/value cache; pass the whole sequence")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + self.embed_positions(torch.arange(x.shape[1], device=x.device))[None]
        make_mask = create_causal_mask if self.config.is_causal else create_bidirectional_mask
        mask = make_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=None)
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        x = self.final_norm(x) if self.config.norm else x
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=self.lm_head(x[:, keep]))


AutoConfig.register(HookedConfig.model_type, HookedConfig, exist_ok=True)
AutoModelForCausalLM.register(HookedConfig, HookedForCausalLM, exist_ok=True)
