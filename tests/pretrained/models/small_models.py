"""Small models of every family: configs as Hugging Face writes them, and tensors in numpy.

No size, epsilon or rotary base is the default of a family. Legend: B batch, L positions.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 2
WINDOW = 5  # keys; LENGTH is longer
LENGTH = 24
THETA = 5000.0
SMALL = {
    "vocab_size": 96,
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
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
FEW = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA3_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 300.0},
    FULL: {"rope_type": "default", "rope_theta": THETA},
}
# Beside SMALL: what a family needs, or has no default for.
SILU = {"hidden_act": "silu", "tie_word_embeddings": False}
GELU = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
IDLE = {"use_sliding_window": False, "max_window_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SILU,
    "mistral": SILU | {"sliding_window": WINDOW},
    "qwen2": SILU | IDLE | {"sliding_window": WINDOW},
    "qwen3": SILU | IDLE | {"sliding_window": WINDOW},
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {
        **GELU,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        **GELU,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 24,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING],
        "rope_parameters": GEMMA3_ROPE,
    },
    "olmo2": SILU,
    "smollm3": {
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "no_rope_layers": [1, 0, 1, 1],
    },
    "phi3": SILU,
    "mixtral": SILU | {"num_local_experts": 6, "num_experts_per_tok": 3},
    "olmoe": SILU | EXPERTS | {"head_dim": 8},  # its norms of queries and keys take hidden / heads
    "qwen3_moe": {
        **SILU,
        **EXPERTS,
        "moe_intermediate_size": 24,
        "use_sliding_window": False,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
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
        """Returns config.json in the form of transformers 5, as far as it matters."""
        if self.sparse:
            experts = {n: v for n, v in FAMILIES[self.family].items() if n in FEW}
            left_out = ("head_dim", "rms_norm_eps", "rope_parameters")
            config = {n: v for n, v in SMALL.items() if n not in left_out} | experts
        else:
            config = SMALL | FAMILIES[self.family] | self.changes
        return {"model_type": self.family} | copy.deepcopy(config)

    def in_form(self, config: dict[str, Any]) -> dict[str, Any]:
        """Returns such a config as the file of this case says it."""
        if self.old:
            config = as_old(config) | self.old_changes
        if not self.nested:
            return config
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "image_token_index": 96,
            "mm_tokens_per_image": 4,
            "text_config": config,
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16},
        }

    @property
    def prefix(self) -> str:
        """The beginning of the tensors' names in the file."""
        return "language_model." if self.nested else ""


def as_old(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config as transformers 4 wrote it: `rope_theta` and `rope_scaling`."""
    dtype = config.get("dtype", "float32")
    config = dict(config, torch_dtype=dtype, transformers_version="4.48.0")
    # `head_dim` is absent in files that are older than the field.
    derived = config["hidden_size"] // config["num_attention_heads"]
    outside = {"dtype", "layer_types", "rope_parameters", "_sliding_window_pattern"}
    outside |= {"head_dim"} if config["head_dim"] == derived else set()
    rope, key = config["rope_parameters"], "type"
    config = {name: value for name, value in config.items() if name not in outside}
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
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


def tokens(case: Case) -> np.ndarray:
    """Returns the tokens that a case is compared on, (B, L)."""
    shape = BATCH, case.length
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], shape).astype(np.int32)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a model, by Hugging Face's names."""
    family, d = config["model_type"], config["hidden_size"]
    heads, f = config["num_attention_heads"], config["intermediate_size"]
    h = config.get("head_dim") or d // heads
    q, kv = heads * h, (config.get("num_key_value_heads") or heads) * h
    found = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = config["vocab_size"], d

    def linear(name: str, out: int, width: int, bias: bool = False) -> None:
        found[f"{name}.weight"] = out, width
        if bias:
            found[f"{name}.bias"] = (out,)

    def mlp(name: str, f: int, names: tuple[str, str, str], bias: bool = False) -> None:
        gate, up, down = names
        linear(f"{name}.{gate}", f, d, bias)
        linear(f"{name}.{up}", f, d, bias)
        linear(f"{name}.{down}", d, f, bias)

    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        norms = {"input_layernorm", "post_attention_layernorm"}
        if family in ("gemma2", "gemma3_text"):
            norms |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
        if family == "olmo2":
            norms = {"post_attention_layernorm", "post_feedforward_layernorm"}
        found |= {f"{layer}.{norm}.weight": (d,) for norm in sorted(norms)}
        part, bias = f"{layer}.self_attn", config.get("attention_bias", False)
        if family == "phi3":
            linear(f"{part}.qkv_proj", q + 2 * kv, d)
        else:
            for name, out in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{part}.{name}_proj", out, d, bias or family == "qwen2")
        linear(f"{part}.o_proj", d, q, bias)
        if family in ("qwen3", "qwen3_moe", "gemma3_text"):
            found |= {f"{part}.{name}_norm.weight": (h,) for name in "qk"}
        if family in ("olmo2", "olmoe"):
            found |= {f"{part}.q_norm.weight": (q,), f"{part}.k_norm.weight": (kv,)}
        experts = config.get("num_experts") or config.get("num_local_experts")
        part, names = f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj")
        if family == "phi3":
            linear(f"{part}.gate_up_proj", 2 * f, d)
            linear(f"{part}.down_proj", d, f)
        elif (
            experts is None
            or number in config.get("mlp_only_layers", ())
            or (number + 1) % config.get("decoder_sparse_step", 1)
        ):
            mlp(part, f, names, config.get("mlp_bias", False))
        else:
            if family == "mixtral":
                part, names = f"{layer}.block_sparse_moe", ("w1", "w3", "w2")
            linear(f"{part}.gate", experts, d)
            for e in range(experts):
                mlp(f"{part}.experts.{e}", config.get("moe_intermediate_size", f), names)
    return found


def drawn(name: str, shape: tuple[int, ...], family: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a random tensor: none is what a fresh model has, such as a norm of 1."""
    z = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        return 0.3 * z if "gemma" in family else 1 + 0.3 * z  # a gemma multiplies by 1 + w
    if name.endswith("bias"):
        return 0.3 * z
    return z * (2.0 if name.endswith(".gate.weight") else 1.0) / math.sqrt(shape[-1])


def write(folder: Path, case: Case) -> dict[str, np.ndarray]:
    """Writes a random model into a folder, and returns its tensors."""
    import ml_dtypes  # noqa: F401  numpy then knows bfloat16
    from safetensors.numpy import save_file

    config, rng = case.config(), np.random.default_rng(0)
    tensors = {
        case.prefix + name: drawn(name, shape, case.family, rng).astype(case.dtype)
        for name, shape in shapes(config).items()
    }
    (folder / "config.json").write_text(json.dumps(case.in_form(config)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def shard(folder: Path) -> dict[str, str]:
    """Splits the tensors over two files with an index, and returns the index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Mapping[str, str]) -> None:
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
