"""The model that a run trains: a causal language model of transformers with random weights, or a checkpoint's."""

import dataclasses
from typing import Any

import torch

from headwater.core.errors import MethodError, ModelError, did_you_mean
from headwater.core.loading_hf import calm, first_line, library
from headwater.dynamics.lab.config import TrainConfig

# What transformers calls the sizes; each configuration class maps these to its own words where it has others.
_SIZES = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_mlp": "intermediate_size",
    "context": "max_position_embeddings",
}
_MLP = {"gpt2": "n_inner", "gptj": "n_inner", "gpt_bigcode": "n_inner", "opt": "ffn_dim"}
_DROPOUTS = ("pdrop", "dropout", "dropout_prob", "dropout_rate")


def make_model(config: TrainConfig, vocabulary: int, length: int, tokenizer: Any | None) -> Any:
    """The bare transformers model on the CPU, in training mode, every weight asking for a gradient.

    Weights are drawn from the config's seed, whatever random state the process is in. Raises MethodError for settings
    that its configuration does not have, ModelError for a type that is no causal language model.
    """
    if config.model.start is not None:
        from headwater.core.loading import load_hf

        hf = load_hf(config.model.start, device="cpu")[0]
        if hf.get_input_embeddings().num_embeddings < vocabulary:
            raise MethodError(
                f"the data has more token ids than {config.model.start}",
                got=vocabulary,
                wanted=f"at most {hf.get_input_embeddings().num_embeddings}",
            )
    else:
        settings = configuration(config, vocabulary, length, tokenizer)
        with torch.random.fork_rng(devices=[]), calm():
            torch.manual_seed(config.seed)
            try:
                hf = library().AutoModelForCausalLM.from_config(settings)
            except (ValueError, RuntimeError, TypeError) as error:
                raise ModelError(f"cannot make a {config.model.type} model", got=first_line(error)) from error
    hf = hf.to(torch.float64 if config.dtype == "float64" else torch.float32)
    for weight in hf.parameters():
        weight.requires_grad_(True)
    return hf.train()


def configuration(config: TrainConfig, vocabulary: int, length: int, tokenizer: Any | None) -> Any:
    """The transformers configuration of a config's model."""
    model = config.model
    auto = library("models.auto.configuration_auto")
    causal = library("models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known = [name for name in auto.CONFIG_MAPPING_NAMES if name in causal]
    if model.type not in known:
        wanted = did_you_mean(model.type, known)
        raise ModelError("unknown type of causal language model", got=repr(model.type), wanted=wanted)
    cls: Any = auto.CONFIG_MAPPING[model.type]
    fields = [one.name for one in dataclasses.fields(cls)] + list(cls.attribute_map)
    asked: dict[str, Any] = {
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads or model.n_heads,
        "d_model": model.d_model,
        "d_mlp": model.d_mlp or 4 * model.d_model,
        "context": model.context or length,
    }
    told = {model.n_kv_heads: "n_kv_heads", model.d_mlp: "d_mlp"}
    settings: dict[str, Any] = {"vocab_size": vocabulary}
    for name, value in asked.items():
        theirs = _MLP.get(model.type, _SIZES[name]) if name == "d_mlp" else _SIZES[name]
        if theirs in fields:
            settings[theirs] = value
        elif name in told.values() and getattr(model, name) is not None:
            raise MethodError(f"a {model.type} model has no such setting", got=name, fix="Leave it out")
    # Dropout would make the early loss curve a matter of chance; whoever wants it says so.
    settings |= {name: 0.0 for name in fields if name.endswith(_DROPOUTS) and name not in model.options}
    for name in ("bos", "eos", "pad"):
        if f"{name}_token_id" in fields:
            settings[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id", None)
    for name in model.options:
        if name not in fields:
            wanted = did_you_mean(name, fields)
            raise MethodError(f"unknown option of a {model.type} model", got=repr(name), wanted=wanted)
    if (model.context or length) < length - 1:
        raise MethodError("the context is shorter than a sequence", got=model.context, wanted=f"at least {length - 1}")
    try:
        return cls(**settings | model.options)
    except Exception as error:  # each configuration class checks in its own way
        raise MethodError(f"the settings of a {model.type} model do not fit", got=first_line(error)) from error
