"""Small GGUF files of every family, with llama.cpp's changes made by plain loops.

The names come from the table of the package gguf, the changes from llama.cpp's converter.
"""

import math
import re

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
from modjax.pretrained.gguf_file import open_gguf  # noqa: E402

# Widths are multiples of 32, the length of a quantised block. heads * head_dim != hidden.
LAYERS, V, D, F, N, G, H, E, F_EXPERT = 2, 40, 64, 96, 4, 2, 32, 3, 32
ALL = (slice(None), slice(None))
KEYS = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": N,
    "attention.head_count_kv": G,
    "attention.key_length": H,
    "attention.value_length": H,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 5e5,
    "rope.dimension_count": H,
}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
    "rope.scaling.yarn_beta_slow": 2.0,
    "rope.scaling.yarn_attn_factor": 1.2,
}
MOE = {"expert_count": E, "expert_used_count": 2}
CONFIG = {
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 128,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": N,
    "num_key_value_heads": G,
    "head_dim": H,
    "rms_norm_eps": 1e-6,
    "vocab_size": V,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
GELU = dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# model_type: (architecture, more keys, more fields)
FAMILIES = {
    "llama": ("llama", {}, {}),
    "mixtral": ("llama", MOE, {"num_local_experts": E, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3_moe": (
        "qwen3moe",
        MOE | {"expert_feed_forward_length": F_EXPERT},
        {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": F_EXPERT}
        | {"norm_topk_prob": True},
    ),
    "gemma": ("gemma", {}, GELU),
    "gemma2": (
        "gemma2",
        {"attention.sliding_window": 8},
        {"sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"query_pre_attn_scalar": H, **GELU},
    ),
    "gemma3_text": (
        "gemma3",
        {"attention.sliding_window": 8},
        {"sliding_window": 8, "sliding_window_pattern": 6, "rope_parameters": GEMMA3_ROPE}
        | {"query_pre_attn_scalar": H, "final_logit_softcapping": None, **GELU},
    ),
    "olmo2": ("olmo2", {}, {}),
    "olmoe": (
        "olmoe",
        MOE,
        {"num_experts": E, "num_experts_per_tok": 2, "norm_topk_prob": False} | {"clip_qkv": None},
    ),
    "phi3": (
        "phi3",
        {"attention.sliding_window": 0, "rope.dimension_count": 24},
        {"rope_parameters": CONFIG["rope_parameters"] | {"partial_rotary_factor": 0.75}}
        | {"sliding_window": None},
    ),
    "smollm3": ("smollm3", {}, {"no_rope_layers": [1, 1]}),
}


def shapes_of(family):
    """Returns the shapes of a model's tensors, by Hugging Face's names."""
    layer = {"self_attn.o_proj.weight": (D, N * H)}
    if family == "phi3":
        layer["self_attn.qkv_proj.weight"] = ((N + 2 * G) * H, D)
    else:
        for part, heads in (("q", N), ("k", G), ("v", G)):
            layer[f"self_attn.{part}_proj.weight"] = (heads * H, D)
            if family in ("qwen2", "llama"):
                layer[f"self_attn.{part}_proj.bias"] = (heads * H,)
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        layer |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
    if family in ("olmo2", "olmoe"):
        layer |= {"self_attn.q_norm.weight": (N * H,), "self_attn.k_norm.weight": (G * H,)}
    norms = ["input", "post_attention"]
    if family in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward", "post_feedforward"]
    if family == "olmo2":
        norms = ["post_attention", "post_feedforward"]
    layer |= {f"{norm}_layernorm.weight": (D,) for norm in norms}
    if family == "phi3":
        layer |= {"mlp.gate_up_proj.weight": (2 * F, D), "mlp.down_proj.weight": (D, F)}
    elif family in ("mixtral", "olmoe", "qwen3_moe"):
        inside = "block_sparse_moe" if family == "mixtral" else "mlp"
        gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate", "up", "down")
        end = "" if family == "mixtral" else "_proj"
        width = F_EXPERT if family == "qwen3_moe" else F
        layer[f"{inside}.gate.weight"] = (E, D)
        for e in range(E):
            layer[f"{inside}.experts.{e}.{gate}{end}.weight"] = (width, D)
            layer[f"{inside}.experts.{e}.{up}{end}.weight"] = (width, D)
            layer[f"{inside}.experts.{e}.{down}{end}.weight"] = (D, width)
    else:
        layer |= {f"mlp.{part}_proj.weight": (F, D) for part in ("gate", "up")}
        layer["mlp.down_proj.weight"] = (D, F)
    if family == "llama":
        layer |= {"self_attn.o_proj.bias": (D,), "mlp.down_proj.bias": (D,)}
        layer |= {"mlp.gate_proj.bias": (F,), "mlp.up_proj.bias": (F,)}
    shapes = {f"model.layers.{i}.{name}": s for i in range(LAYERS) for name, s in layer.items()}
    shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    # llama.cpp stores no head of a gemma.
    return shapes | ({} if "gemma" in family else {"lm_head.weight": (V, D)})


def drawn(family):
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes_of(family).items()}


def converted(family, tensors):
    """Returns Hugging Face's tensors as llama.cpp stores them, by llama.cpp's names."""
    arch = FAMILIES[family][0]
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], LAYERS)
    stored, stacks = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight") and arch.startswith("gemma"):
            tensor = tensor + 1
        turned = re.search(r"\.([qk])_proj\.", name)
        if turned and arch in ("llama", "smollm3"):
            tensor = interleaved(tensor, N if turned[1] == "q" else G)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert:
            # The converter names stacks of mixtral as Meta does.
            whole = name.replace(expert[0], ".experts.")
            whole = whole.replace("model.layers", "layers") if family == "mixtral" else whole
            whole = whole.replace("block_sparse_moe", "feed_forward")
            stacks.setdefault(whole, []).append(tensor)
        else:
            stored[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    for name, stack in stacks.items():
        stored[names.get_name(name, try_suffixes=(".weight",))] = np.stack(stack)
    assert None not in stored and len(stored) == len(tensors) - sum(
        len(s) - 1 for s in stacks.values()
    )
    return stored


def interleaved(tensor, heads):
    """Returns the rows of each head in the order 0, H/2, 1, H/2 + 1, .."""
    out = np.empty_like(tensor)
    width = len(tensor) // heads
    for head in range(heads):
        for pair in range(width // 2):
            for half in range(2):
                old = head * width + half * (width // 2) + pair
                out[head * width + 2 * pair + half] = tensor[old]
    return out


def write(path, arch, keys, tensors, kinds=None):
    """Writes a GGUF file. `kinds` are the types of tensors that are not float32."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        key = key if key.startswith("split.") else f"{arch}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.0, 1.0])
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_family(path, family, more=None, without=(), kinds=None):
    """Writes a random model. Returns its tensors by Hugging Face's names."""
    arch, keys, _ = FAMILIES[family]
    tensors = drawn(family)
    keys = {k: v for k, v in (KEYS | keys | (more or {})).items() if k not in without}
    write(path, arch, keys, converted(family, tensors), kinds)
    return tensors


def config_of(tmp_path, family, more=None, without=(), extra=None):
    arch, keys, _ = FAMILIES[family]
    keys = {k: v for k, v in (KEYS | keys | (more or {})).items() if k not in without}
    tensors = {"token_embd.weight": np.zeros((V, D), np.float32), **(extra or {})}
    write(tmp_path / "model.gguf", arch, keys, tensors)
    file = open_gguf(tmp_path / "model.gguf")
    assert list(file.shapes) == ["model.embed_tokens.weight"]
    return file.config


def llama3_divisors(factor, original):
    """Returns what llama.cpp's converter stores for Llama 3: f / f' of each pair."""
    divisors = []
    for i in range(H // 2):
        wave = 2 * math.pi * 5e5 ** (2 * i / H)
        if wave < original / 4:
            divisors.append(1.0)
        elif wave > original:
            divisors.append(factor)
        else:
            smooth = (original / wave - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)
