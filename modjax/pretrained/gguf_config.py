"""Conversion of the keys of a GGUF file to Hugging Face's config.json.

llama.cpp's converter (conversion/) leaves out fields that are constants in llama.cpp
(src/models/).
"""

from pathlib import Path
from typing import Any

import numpy as np

from modjax.errors import InputError, require
from modjax.pretrained.families import CONTEXT

_GEMMA: dict[str, Any] = dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
_CONSTANTS: dict[str, dict[str, Any]] = {  # by architecture; a key of the file overrides them
    **{arch: {} for arch in ("llama", "qwen2", "qwen3", "olmo2", "smollm3")},
    "gemma": _GEMMA,
    "gemma2": {"sliding_window": 4096, "attn_logit_softcapping": 50.0}
    | {"final_logit_softcapping": 30.0, **_GEMMA},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": None, "sliding_window_pattern": 6}
    | {"final_logit_softcapping": None, **_GEMMA},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None},
    "phi3": {"sliding_window": None},
    "qwen3moe": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}
_REQUIRED = (
    {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings"}
    | {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"}
    | {"attention.head_count": "num_attention_heads"}
    | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
)
_OPTIONAL = (
    {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
    | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
    | {"expert_feed_forward_length": "moe_intermediate_size"}
)
_OF_SOME = (  # read only if the architecture has the field in _CONSTANTS
    {f"attention.{field}": field for field in ("sliding_window", "sliding_window_pattern")}
    | {field: field for field in ("attn_logit_softcapping", "final_logit_softcapping")}
    | {"attention.clamp_kqv": "clip_qkv"}
)
_SHOWN_BY_TENSORS = ("vocab_size", "attention.value_length")
_WITHOUT_EFFECT = ("tensor_data_layout", "pooling_type", "rope.scaling.finetuned")
_YARN = {"factor": "factor", "yarn_attn_factor": "attention_factor"} | {
    f"yarn_{field}": field for field in ("beta_fast", "beta_slow")
}


def config_of(
    path: Path,
    keys: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    factors: dict[str, list[float]],
) -> dict[str, Any]:
    """Returns the fields of config.json.

    path: the file, for error messages.
    keys: the metadata of the file, without the tokenizer's.
    shapes: the shape of each tensor except the factors, by GGUF's name.
    factors: the tensors that scale rotary frequencies, by GGUF's name. Used ones are removed.
    Raises InputError for an unknown key or factor, because it may change what the model computes.
    """
    arch = keys.get("general.architecture")
    known = ", ".join(_CONSTANTS)
    require(arch in _CONSTANTS, f"{path}: general.architecture", arch, f"must be one of {known}")
    values = {k.removeprefix(f"{arch}."): v for k, v in keys.items() if k.startswith(f"{arch}.")}
    for key in (*_SHOWN_BY_TENSORS, *_WITHOUT_EFFECT):
        values.pop(key, None)
    config = {"model_type": arch, "hidden_act": "silu", **_CONSTANTS[str(arch)]}
    of_some = {key: field for key, field in _OF_SOME.items() if field in config}
    for key, field in (_REQUIRED | _OPTIONAL | of_some).items():
        value = values.pop(key, 0)
        right = type(value) in (int, float) and (value > 0 or (value == 0 and key not in _REQUIRED))
        require(right, f"{path}: {arch}.{key}", value, "must be a positive number for all layers")
        if value:  # 0 means that the key is absent or off
            config[field] = value
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    config = {"num_key_value_heads": heads, "head_dim": width // heads, **config}
    require("token_embd.weight" in shapes, f"{path}: token_embd.weight", None, "is missing")
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["attention_bias"] = "blk.0.attn_output.bias" in shapes
    config["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    config["rope_parameters"] = rope = _rope(values, config, factors)
    if arch == "llama" and "num_experts" in config:
        config |= {"model_type": "mixtral", "num_local_experts": config.pop("num_experts")}
    if arch == "smollm3":
        config["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(layers)]
    if arch in ("gemma2", "gemma3"):  # llama.cpp knows the largest of each by its depth
        largest = layers == (46 if arch == "gemma2" else 62)
        config["query_pre_attn_scalar"] = width // heads if largest else config["head_dim"]
    if arch == "gemma3":
        local = {"rope_type": "default", "rope_theta": values.pop("rope.freq_base_swa", 1e4)}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    for key, value in ({f"{arch}.{key}": value for key, value in values.items()} | factors).items():
        raise InputError(f"{path}: {key}", value, "is a key or a value that modjax cannot use")
    return config


def _rope(
    values: dict[str, Any], config: dict[str, Any], factors: dict[str, list[float]]
) -> dict[str, Any]:
    """Returns Hugging Face's rope_parameters. Removes the values and factors that it used."""

    def take(fields: dict[str, str]) -> dict[str, Any]:
        keys = {f"rope.scaling.{key}": field for key, field in fields.items()}
        return {field: values.pop(key) for key, field in keys.items() if key in values}

    kind = values.pop("rope.scaling.type", "linear")
    rope = {"rope_type": kind, "rope_theta": values.pop("rope.freq_base", 1e4)}
    share = values.pop("rope.dimension_count", config["head_dim"]) / config["head_dim"]
    rope |= {} if share == 1 else {"partial_rotary_factor": share}
    original = {CONTEXT: config["max_position_embeddings"]}
    original |= take({"original_context_length": CONTEXT})
    names = {f"{name}_factor": f"rope_factors_{name}.weight" for name in ("short", "long")}
    if factors.keys() >= set(names.values()) and kind in ("linear", "none", "longrope"):
        rope |= {field: factors.pop(name) for field, name in names.items()} | original
        return rope | take({"attn_factor": "attention_factor"}) | {"rope_type": "longrope"}
    if "rope_freqs.weight" in factors and kind in ("linear", "none"):
        return rope | _by_divisors(factors.pop("rope_freqs.weight"), rope["rope_theta"], original)
    if kind == "yarn":
        return rope | original | take(_YARN)
    scaled = take({"factor": "factor"})
    if kind == "linear" and scaled.get("factor"):
        return rope | scaled
    if kind not in ("linear", "none"):
        values["rope.scaling.type"] = kind  # to be refused
    return rope | {"rope_type": "default"}


def _by_divisors(divisors: list[float], theta: float, original: dict[str, int]) -> dict[str, Any]:
    """Returns Llama 3's scaling if it has these divisors of frequencies, otherwise longrope."""
    factor, low, high, context = max(divisors), 1.0, 4.0, 8192  # in all models of Llama 3
    wavelengths = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-6, atol=0):
        found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
        return found | {"high_freq_factor": high, CONTEXT: context}
    both = {"short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    return {"rope_type": "longrope", **both, **original}
