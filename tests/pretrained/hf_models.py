"""Tiny random Hugging Face models of every family, as files, and what they compute.

Every tensor is drawn: fresh norms are 1, biases and routers 0, so that faults in them do not show.
No size, epsilon or rotary base is the default of a family. Legend: B batch, L positions.
"""

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 2
WINDOW = 5  # keys; LENGTH is longer
LENGTH = 24
THETA = 5000.0
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
SMALL_EXPERTS = EXPERTS | {"moe_intermediate_size": 24}
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA3_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 300.0},
    FULL: {"rope_type": "default", "rope_theta": THETA},
}
# Beside SMALL: what a family needs, or has no default for.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW},  # which means nothing without use_sliding_window
    "qwen3": {"sliding_window": WINDOW},
    "gemma": {},
    "gemma2": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING],
        "rope_parameters": GEMMA3_ROPE,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "phi3": {},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": EXPERTS | {"head_dim": 8},  # its norms of queries and keys take hidden / heads
    "qwen3_moe": SMALL_EXPERTS | {"norm_topk_prob": True},
}


@dataclass(frozen=True)
class Case:
    """A model of a family, and the form of its files.

    changes: of the config.
    old: config.json as before transformers 5, with `old_changes`.
    sparse: config.json without the fields that have the family's default.
    nested: config.json and names as in a model of images and text.
    """

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    old: bool = False
    old_changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    shard_size: str = "50GB"
    sparse: bool = False
    nested: bool = False
    length: int = LENGTH

    def config(self) -> dict[str, Any]:
        if self.sparse:
            experts = SMALL_EXPERTS if self.family == "qwen3_moe" else {}
            left_out = ("head_dim", "rms_norm_eps", "rope_parameters")
            return {n: v for n, v in SMALL.items() if n not in left_out} | experts
        return SMALL | FAMILIES[self.family] | self.changes


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": THETA} | values}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
# Phi 3 checks the factors' number against hidden_size / num_attention_heads.
LONGROPE = {
    "head_dim": 8,
    "original_max_position_embeddings": 32,
    **rope(
        "longrope",
        short_factor=[1.0, 1.1, 1.3, 1.5],
        long_factor=[1.2, 2.0, 3.0, 4.0],
        original_max_position_embeddings=32,
    ),
}
NO_HEAD_DIM = {"head_dim": None}
MIXED = [FULL, SLIDING, SLIDING, FULL]
CASES: dict[str, Case] = {
    **{family: Case(family) for family in FAMILIES},
    **{f"{family}, defaults": Case(family, sparse=True) for family in FAMILIES},
    "llama, old": Case("llama", old=True),
    "llama, tied": Case("llama", {"tie_word_embeddings": True}, old=True),
    "llama, one key head per head": Case(
        "llama",
        {"head_dim": None, "num_key_value_heads": None},
        old=True,
        old_changes={"head_dim": None, "num_key_value_heads": None},
    ),
    "llama, biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": Case("llama", rope("linear", factor=2.5)),
    "llama, linear, old": Case("llama", rope("linear", factor=2.5), old=True),
    "llama, llama3": Case("llama", LLAMA3),
    "llama, llama3, old": Case("llama", LLAMA3, old=True),
    "llama, yarn": Case("llama", YARN),
    "llama, yarn with all fields, old": Case(
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            attention_factor=1.3,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
        old=True,
    ),
    "llama, yarn with mscale": Case(
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            mscale=1.5,
            mscale_all_dim=0.7,
        ),
    ),
    "llama, sharded bfloat16": Case("llama", dtype="bfloat16", shard_size="20KB"),
    "llama, float16, old": Case("llama", dtype="float16", old=True),
    "mistral, old": Case("mistral", old=True),
    "mistral, no window": Case("mistral", {"sliding_window": None}, old=True),
    "qwen2, windows": Case("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2, windows, old": Case(
        "qwen2", {"use_sliding_window": True, "max_window_layers": 2}, old=True
    ),
    "qwen2, idle window, old": Case("qwen2", old=True, old_changes={"sliding_window": WINDOW}),
    "qwen2, layer types": Case("qwen2", {"use_sliding_window": True, "layer_types": MIXED}),
    "qwen2, tied, yarn, old": Case(
        "qwen2", {"tie_word_embeddings": True, "head_dim": 8} | YARN, old=True
    ),
    "qwen3, windows, old": Case(
        "qwen3", {"use_sliding_window": True, "max_window_layers": 3}, old=True
    ),
    "qwen3, layer types": Case("qwen3", {"use_sliding_window": True, "layer_types": MIXED}),
    "qwen3, layer types, old": Case(
        "qwen3",
        {"use_sliding_window": True, "layer_types": MIXED},
        old=True,
        old_changes={"layer_types": MIXED},
    ),
    "qwen3, biases, yarn": Case(
        "qwen3", {"attention_bias": True, "tie_word_embeddings": True} | YARN
    ),
    "gemma, old": Case("gemma", old=True, old_changes={"hidden_act": "gelu"}),
    "gemma, not tied, biases": Case(
        "gemma", {"tie_word_embeddings": False, "attention_bias": True}
    ),
    "gemma, bfloat16": Case("gemma", dtype="bfloat16"),
    "gemma2, old": Case("gemma2", old=True),
    "gemma2, layer types, no caps": Case(
        "gemma2",
        {
            "layer_types": MIXED,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3_text, old": Case(
        "gemma3_text",
        {"layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
        old=True,
        old_changes={"sliding_window_pattern": 3},
    ),
    "gemma3_text, linear, old": Case(
        "gemma3_text",
        {
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "rope_parameters": {
                SLIDING: GEMMA3_ROPE[SLIDING],
                FULL: {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
            },
        },
        old=True,
        old_changes={"sliding_window_pattern": 2},
    ),
    "gemma3, nested": Case("gemma3_text", nested=True),
    "gemma3, nested, old": Case(
        "gemma3_text",
        {"layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
        old=True,
        old_changes={"sliding_window_pattern": 3},
        dtype="bfloat16",
        nested=True,
    ),
    "gemma3, nested, defaults": Case("gemma3_text", sparse=True, nested=True),
    "olmo2, old": Case("olmo2", {"tie_word_embeddings": True}, old=True),
    "olmo2, biases": Case("olmo2", {"attention_bias": True}),
    "smollm3, windows, biases": Case(
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3, interval, old": Case(
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 2},
        old=True,
        old_changes={"no_rope_layers": None},
    ),
    "smollm3, yarn": Case("smollm3", YARN),
    "phi3, window, old": Case("phi3", {"sliding_window": WINDOW}, old=True),
    "phi3, half turned": Case("phi3", rope("default", partial_rotary_factor=0.5)),
    "phi3, half turned, old": Case("phi3", rope("default", partial_rotary_factor=0.5), old=True),
    "phi3, longrope": Case("phi3", LONGROPE),
    "phi3, longrope, long, old": Case("phi3", LONGROPE, old=True, length=40),
    "phi3, longrope, half turned": Case(
        "phi3",
        LONGROPE
        | rope(
            "longrope",
            short_factor=[1.0, 1.3],
            long_factor=[1.2, 3.0],
            original_max_position_embeddings=32,
            partial_rotary_factor=0.5,
        ),
        length=40,
    ),
    "mixtral, window, old": Case("mixtral", {"sliding_window": WINDOW}, old=True),
    "olmoe, clipped": Case("olmoe", {"clip_qkv": 0.8, "norm_topk_prob": True}),
    "olmoe, old": Case("olmoe", {"attention_bias": True}, old=True),
    "qwen3_moe, not renormalised": Case(
        "qwen3_moe",
        {"norm_topk_prob": False, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
    "qwen3_moe, windows, old": Case(
        "qwen3_moe",
        {
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "num_experts_per_tok": 3,
        },
        old=True,
    ),
}


def silence() -> None:
    """Imports transformers without its warnings and progress bars."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make(case: Case) -> Any:
    """Returns the model of a case, in float32, with the values that its files can express."""
    silence()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = case.config()
    attention = values.pop("attn_implementation")
    config = AutoConfig.for_model(case.family, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    draw(model, np.random.default_rng(0), getattr(torch, case.dtype))
    return model


def draw(model: Any, rng: np.random.Generator, dtype: Any) -> None:
    """Draws every tensor of a model, rounded to `dtype`."""
    import torch

    centre = 0.0 if "gemma" in model.config.model_type else 1.0  # a gemma multiplies by 1 + w
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            z = rng.standard_normal(tuple(parameter.shape))
            if name.endswith("norm.weight"):
                z = centre + 0.3 * z
            elif name.endswith("bias"):
                z *= 0.3
            else:
                z *= (2.0 if "mlp.gate.weight" in name else 1.0) / np.sqrt(z.shape[-1])
            parameter.copy_(torch.tensor(z).to(dtype))


def tokens(case: Case) -> np.ndarray:
    """Returns the tokens that a case is compared on, (B, L)."""
    shape = BATCH, case.length
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], shape).astype(np.int32)


def logits(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BL, dtype=torch.long), use_cache=False).logits.numpy()


def save(case: Case, model: Any, folder: Path) -> None:
    """Writes a model as files of the form that the case asks for."""
    import torch

    stored = copy.deepcopy(model).to(getattr(torch, case.dtype))  # rounds rotary tables too
    stored.save_pretrained(folder, max_shard_size=case.shard_size)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if case.sparse:
        default = type(model.config)().to_dict() | {"model_type": None}
        derived = {"layer_types", "no_rope_layers"}
        config = {
            name: value
            for name, value in config.items()
            if name not in derived and (name not in default or default[name] != value)
        }
    if case.old:
        config = as_old(config) | case.old_changes
    if case.nested:
        nest(folder)
        config = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "image_token_index": 96,
            "mm_tokens_per_image": 4,
            "text_config": config,
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16},
        }
    path.write_text(json.dumps(config, indent=2))


def as_old(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config as transformers 4 wrote it: `rope_theta` and `rope_scaling`."""
    config = dict(config, torch_dtype=config["dtype"], transformers_version="4.48.0")
    # `head_dim` is absent in files that are older than the field.
    derived = config["hidden_size"] // config["num_attention_heads"]
    outside = {"dtype", "layer_types", "rope_parameters", "_sliding_window_pattern"}
    outside |= {"head_dim"} if config["head_dim"] == derived else set()
    rope, key = config["rope_parameters"], "type"
    config = {name: value for name, value in config.items() if name not in outside}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    if FULL in rope:
        config["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
        rope, key = rope[FULL], "rope_type"  # transformers ignores Gemma 3's `type`
    if rope["rope_type"] == "llama3":
        key = "rope_type"
    config["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    outside = {"rope_type", "rope_theta", "partial_rotary_factor"}
    if config["model_type"] == "phi3":  # has it beside rope_scaling
        outside.add("original_max_position_embeddings")
    scaling = {name: value for name, value in rope.items() if name not in outside}
    kind = rope["rope_type"]
    config["rope_scaling"] = None if kind == "default" else scaling | {key: kind}
    return config


def nest(folder: Path) -> None:
    """Renames the tensors as those of the text part of a model of images and text."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    found = load_file(path)
    save_file({f"language_model.{n}": t for n, t in found.items()}, path, {"format": "pt"})
