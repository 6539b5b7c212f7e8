"""The config of GGUF files: their keys, llama.cpp's constants, and what is refused."""

import numpy as np
import pytest

from modjax.errors import InputError

gguf = pytest.importorskip("gguf")
from modjax.pretrained.gguf_file import open_gguf  # noqa: E402
from tests.pretrained.models.small_gguf import (  # noqa: E402
    CONFIG,
    FAMILIES,
    LINEAR,
    YARN,
    D,
    F,
    H,
    N,
    V,
    config_of,
    llama3_divisors,
    write,
    write_family,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_every_family_have_the_keys_and_the_constants_of_llama_cpp(family, tmp_path):
    fields = FAMILIES[family][2]
    expected = CONFIG | {"model_type": family, "tie_word_embeddings": True} | fields
    assert config_of(tmp_path, family) == expected


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
