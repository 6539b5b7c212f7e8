"""One decoder in float64 numpy with the switches of every family, written from their formulas.

It reads config.json, with every field that the family has, and tensors by Hugging Face's names.

Legend: B batch, L positions, D model width, F feed-forward width, N heads, G kv heads, H head
width, R half of the turned part of a head, E experts, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FULL, SLIDING = "full_attention", "sliding_attention"


class Weights:
    """Tensors by the end of their names, in float64. `used` collects the names that were read."""

    def __init__(self, tensors: Mapping[str, Any], prefix: str, used: set[str]):
        self.tensors, self.prefix, self.used = tensors, prefix, used

    def part(self, name: str) -> "Weights":
        return Weights(self.tensors, f"{self.prefix}{name}.", self.used)

    def has(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __getitem__(self, name: str) -> np.ndarray:
        self.used.add(self.prefix + name)
        return np.asarray(self.tensors[self.prefix + name]).astype(np.float64)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if self.has(f"{name}.bias") else y


def decode(config: Mapping[str, Any], tensors: Mapping[str, Any], tokens_BL: Any) -> np.ndarray:
    """Returns the logits, (B, L, V). Raises AssertionError if it has not used every tensor."""
    config, prefix = dict(config), ""
    if config["model_type"] == "gemma3":
        config, prefix = dict(config["text_config"]), "language_model."
    weights = Weights(tensors, prefix, set())
    model, family, eps = weights.part("model"), config["model_type"], config["rms_norm_eps"]

    def norm(x, weights, name):
        w = weights[f"{name}.weight"]
        return rms_norm(x, 1 + w if family.startswith("gemma") else w, eps)

    x_BLD = model["embed_tokens.weight"][np.asarray(tokens_BL)]
    if family.startswith("gemma"):
        x_BLD = x_BLD * math.sqrt(config["hidden_size"])
    for number in range(config["num_hidden_layers"]):
        layer = model.part(f"layers.{number}")
        for kind, before, after in (
            ("attention", "input_layernorm", "post_attention_layernorm"),
            ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ):
            if family not in ("gemma2", "gemma3_text", "olmo2"):
                before, after = before if kind == "attention" else "post_attention_layernorm", ""
            if family == "olmo2":
                before = ""
            y_BLD = norm(x_BLD, layer, before) if before else x_BLD
            if kind == "attention":
                y_BLD = attention(config, layer.part("self_attn"), y_BLD, number, norm)
            else:
                y_BLD = feed_forward(config, layer, y_BLD, number)
            x_BLD = x_BLD + (norm(y_BLD, layer, after) if after else y_BLD)
    x_BLD = norm(x_BLD, model, "norm")
    head = weights if weights.has("lm_head.weight") else model
    w_VD = head["lm_head.weight" if head is weights else "embed_tokens.weight"]
    assert weights.used == set(tensors)
    return capped(x_BLD @ w_VD.T, config.get("final_logit_softcapping"))


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * w


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def attention(config, weights, x_BLD, number, norm):
    """Returns attention's update of the stream, (B, L, D)."""
    batch, length, width = x_BLD.shape
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    if weights.has("qkv_proj.weight"):
        sizes = np.cumsum([heads, kv_heads]) * head_dim
        q, k, v = np.split(weights.linear(x_BLD, "qkv_proj"), sizes, axis=-1)
    else:
        q, k, v = (weights.linear(x_BLD, f"{name}_proj") for name in "qkv")
    each = config["model_type"] in ("qwen3", "qwen3_moe", "gemma3_text")  # norms of single heads
    if weights.has("q_norm.weight") and not each:
        q, k = norm(q, weights, "q_norm"), norm(k, weights, "k_norm")
    if config.get("clip_qkv") is not None:
        q, k, v = (np.clip(z, -config["clip_qkv"], config["clip_qkv"]) for z in (q, k, v))
    q_BLNH, k_BLGH, v_BLGH = (z.reshape(batch, length, -1, head_dim) for z in (q, k, v))
    if each:
        q_BLNH, k_BLGH = norm(q_BLNH, weights, "q_norm"), norm(k_BLGH, weights, "k_norm")
    kind = layer_kind(config, number)
    if turns(config, number):
        q_BLNH, k_BLGH = (rotate(config, kind, z, head_dim) for z in (q_BLNH, k_BLGH))
    scale = config.get("query_pre_attn_scalar", head_dim) ** -0.5
    away_LL = np.arange(length)[:, None] - np.arange(length)[None]
    seen_LL = (away_LL >= 0) & (away_LL < (config["sliding_window"] if kind == SLIDING else length))
    cap = config["attn_logit_softcapping"] if config["model_type"] == "gemma2" else None
    out_BLNH = np.empty_like(q_BLNH)
    for n in range(heads):
        g = n // (heads // kv_heads)
        scores_BLL = q_BLNH[:, :, n] @ k_BLGH[:, :, g].swapaxes(1, 2) * scale
        scores_BLL = np.where(seen_LL, capped(scores_BLL, cap), -np.inf)
        out_BLNH[:, :, n] = softmax(scores_BLL) @ v_BLGH[:, :, g]
    return weights.linear(out_BLNH.reshape(batch, length, -1), "o_proj")


def layer_kind(config, number):
    """Returns whether a layer's attention is "full_attention" or "sliding_attention"."""
    family, window = config["model_type"], config.get("sliding_window")
    if family in ("mistral", "mixtral", "phi3"):
        return FULL if window is None else SLIDING
    if family.startswith("qwen") and not config["use_sliding_window"]:
        return FULL
    if family == "smollm3" and not config["use_sliding_window"]:
        return FULL
    if config.get("layer_types") is not None:
        return config["layer_types"][number]
    if family == "qwen3_moe":
        return SLIDING
    if family.startswith("qwen"):
        return SLIDING if number >= config["max_window_layers"] else FULL
    if family == "smollm3":
        return FULL if turns(config, number) else SLIDING
    if family.startswith("gemma"):
        every = {"gemma": 1, "gemma2": 2}.get(family) or config["sliding_window_pattern"]
        return SLIDING if (number + 1) % every else FULL
    return FULL


def turns(config, number):
    """Returns whether a layer has rotary positions."""
    if config["model_type"] != "smollm3":
        return True
    if config["no_rope_layers"] is None:
        return (number + 1) % config["no_rope_layer_interval"] != 0
    return bool(config["no_rope_layers"][number])


def rope_of(config, kind):
    """Returns the rotary fields of a layer's kind, in the form of transformers 5."""
    if "rope_parameters" in config:
        rope = config["rope_parameters"]
        return rope.get(kind, rope)
    if kind == SLIDING and "rope_local_base_freq" in config:
        return {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
    rope = dict(config["rope_scaling"] or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if name in config:
            rope[name] = config[name]
    return rope


def frequencies(config, rope, dim, length):
    """Returns each pair's angle per position, and the factor of cosines and sines."""
    theta, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    f_R = theta ** (-np.arange(0, dim, 2) / dim)
    if kind == "default":
        return f_R, 1.0
    if kind == "linear":
        return f_R / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns_R = original * f_R / (2 * math.pi)  # during the original context
        s_R = np.clip((turns_R - low) / (high - low), 0, 1)
        return (1 - s_R) * f_R / factor + s_R * f_R, 1.0
    if kind == "yarn":
        ends = [rope.get("beta_fast", 32), rope.get("beta_slow", 1)]
        first, last = (
            dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in ends
        )
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp_R = np.clip((np.arange(dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        m, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = 0.1 * math.log(factor) + 1
        if m and all_dim:
            scale = (0.1 * m * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
        return f_R / factor * ramp_R + f_R * (1 - ramp_R), rope.get("attention_factor") or scale
    assert kind == "longrope"
    factors_R = np.array(rope["long_factor" if length > original else "short_factor"])
    longer = config["max_position_embeddings"] / original
    return f_R / factors_R, math.sqrt(1 + math.log(longer) / math.log(original))


def rotate(config, kind, x_BLNH, head_dim):
    """Returns heads with the pairs (i, i + R) turned; the rest of each head stays."""
    rope, length = rope_of(config, kind), x_BLNH.shape[1]
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    f_R, scale = frequencies(config, rope, dim, length)
    turned = np.exp(1j * np.arange(length)[:, None, None] * f_R) * scale
    z_BLNR = (x_BLNH[..., : dim // 2] + 1j * x_BLNH[..., dim // 2 : dim]) * turned
    return np.concatenate([z_BLNR.real, z_BLNR.imag, x_BLNH[..., dim:]], axis=-1)


def feed_forward(config, layer, x_BLD, number):
    """Returns the update of the stream by an MLP or a mixture of experts, (B, L, D)."""
    family = config["model_type"]
    if family in ("mixtral", "olmoe") or (
        family == "qwen3_moe"
        and number not in config["mlp_only_layers"]
        and (number + 1) % config["decoder_sparse_step"] == 0
    ):
        return experts(
            config, layer.part("block_sparse_moe" if family == "mixtral" else "mlp"), x_BLD
        )
    return mlp(config, layer.part("mlp"), x_BLD)


def mlp(config, weights, x_BLD):
    if weights.has("gate_up_proj.weight"):
        gate_BLF, up_BLF = np.split(weights.linear(x_BLD, "gate_up_proj"), 2, axis=-1)
    elif weights.has("w1.weight"):
        gate_BLF, up_BLF = weights.linear(x_BLD, "w1"), weights.linear(x_BLD, "w3")
    else:
        gate_BLF, up_BLF = (weights.linear(x_BLD, f"{n}_proj") for n in ("gate", "up"))
    down = "w2" if weights.has("w2.weight") else "down_proj"
    return weights.linear(activation(config, gate_BLF) * up_BLF, down)


def activation(config, x):
    name = config.get("hidden_activation") or config["hidden_act"]
    if name == "silu":
        return x / (1 + np.exp(-x))
    assert name in ("gelu", "gelu_pytorch_tanh")  # which gemma computes alike
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def experts(config, weights, x_BLD):
    shares_BLE = softmax(weights.linear(x_BLD, "gate"))
    k = config["num_experts_per_tok"]
    bar_BL1 = np.sort(shares_BLE, axis=-1)[..., -k, None]
    shares_BLE = np.where(shares_BLE >= bar_BL1, shares_BLE, 0)
    if config.get("norm_topk_prob", config["model_type"] == "mixtral"):
        shares_BLE /= np.sum(shares_BLE, axis=-1, keepdims=True)
    each = (mlp(config, weights.part(f"experts.{e}"), x_BLD) for e in range(shares_BLE.shape[-1]))
    return sum(shares_BLE[..., e, None] * y_BLD for e, y_BLD in enumerate(each))
