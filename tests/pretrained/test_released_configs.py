"""The fields of released config.json files, whatever version of transformers wrote them, are read.

They have idle fields, which no code reads, and leave out fields that have their default.
"""

import pytest

from modjax.flops import parameters
from modjax.pretrained.config import read_config
from modjax.specs import Attention, MoE

OF_ALL = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [1, 2],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}


def sizes(vocab_size, width, layers, heads, kv_heads, hidden, eps=1e-6):
    return OF_ALL | {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
    }


QWEN = {"use_sliding_window": False, "rope_theta": 1e6, "tie_word_embeddings": False}
GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
}
RELEASED = {
    "Llama 2": sizes(32_000, 4096, 32, 32, 32, 11_008, 1e-5)
    | {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None},
    "Llama 3.1": sizes(128_256, 4096, 32, 32, 8, 14_336, 1e-5)
    | {
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "SmolLM2": sizes(49_152, 576, 30, 9, 3, 1536, 1e-5)
    | {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100_000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"dtype": "q4"},
    },
    "Mistral 7B v0.3": sizes(32_768, 4096, 32, 32, 8, 14_336, 1e-5)
    | {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None},
    "Qwen2.5": sizes(151_936, 896, 24, 14, 2, 4864)
    | QWEN
    | {
        "model_type": "qwen2",
        "max_window_layers": 21,
        "sliding_window": 32_768,
        "use_mrope": False,
    },
    "Qwen3": sizes(151_936, 1024, 28, 16, 8, 3072)
    | QWEN
    | {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "max_window_layers": 28,
        "rope_scaling": None,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": sizes(151_936, 2048, 48, 32, 4, 6144)
    | QWEN
    | {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        # As transformers 4.57 wrote it: both forms.
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "rope_scaling": None,
    },
    "Gemma 2B": sizes(256_000, 2048, 18, 8, 1, 16_384)
    | {
        "model_type": "gemma",
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
    },
    "Gemma 2 9B": sizes(256_000, 3584, 42, 16, 8, 14_336)
    | GEMMA2
    | {"head_dim": 256, "query_pre_attn_scalar": 256},
    "Gemma 2 27B": sizes(256_000, 4608, 46, 32, 16, 36_864)
    | GEMMA2
    | {"head_dim": 128, "query_pre_attn_scalar": 144, "_attn_implementation": "eager"},
    "Gemma 3 4B, its text": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "OLMo 2": sizes(100_352, 4096, 32, 32, 32, 11_008)
    | {
        "model_type": "olmo2",
        "attention_bias": False,
        "pad_token_id": 100_277,
        "rope_scaling": None,
        "rope_theta": 500_000,
    },
    "SmolLM3": sizes(128_256, 2048, 36, 16, 4, 11_008)
    | {
        "model_type": "smollm3",
        "attention_bias": False,
        "layer_types": ["full_attention"] * 36,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "pretraining_tp": 2,
        "rope_scaling": None,
        "rope_theta": 5e6,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Phi-3 mini": sizes(32_064, 3072, 32, 32, 32, 8192, 1e-5)
    | {
        "model_type": "phi3",
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
        "sliding_window": 2047,
    },
    "Phi-4 mini": sizes(200_064, 3072, 32, 24, 8, 8192, 1e-5)
    | {
        "model_type": "phi3",
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1] * 48, "type": "longrope"},
        "rope_theta": 10_000.0,
        "sliding_window": 262_144,
        "tie_word_embeddings": True,
    },
    "Mixtral 8x7B": sizes(32_000, 4096, 32, 32, 8, 14_336, 1e-5)
    | {
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "OLMoE": sizes(50_304, 2048, 16, 16, 16, 1024, 1e-5)
    | {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.01,
    },
}
# Billions of numbers in each, as their cards say them.
BILLIONS = {
    "Llama 2": 6.74,
    "Llama 3.1": 8.03,
    "SmolLM2": 0.135,
    "Mistral 7B v0.3": 7.25,
    "Qwen2.5": 0.494,
    "Qwen3": 0.596,
    "Qwen3-30B-A3B": 30.5,
    "Gemma 2B": 2.51,
    "Gemma 2 9B": 9.24,
    "Gemma 2 27B": 27.2,
    "Gemma 3 4B, its text": 3.88,
    "OLMo 2": 7.30,
    "SmolLM3": 3.08,
    "Phi-3 mini": 3.82,
    "Phi-4 mini": 3.84,
    "Mixtral 8x7B": 46.7,
    "OLMoE": 6.92,
}
TIED = ("SmolLM2", "Qwen2.5", "Qwen3", "Gemma", "SmolLM3", "Phi-4")


def spec_of(name):
    tied = name.startswith(TIED) and name != "Qwen3-30B-A3B"
    return read_config(RELEASED[name], tied=tied, dtype="bfloat16")


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_has_the_parameters_that_its_card_says(name):
    assert parameters(spec_of(name))["total"] / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


def attentions(name):
    blocks = spec_of(name).blocks()
    return [part for block in blocks for part in block.parts if isinstance(part, Attention)]


def test_fields_that_are_left_out_have_the_default_of_the_family():
    gemma = attentions("Gemma 3 4B, its text")
    assert [str(a.mask.reach[0]) for a in gemma[:6]] == ["1023"] * 5 + ["None"]
    assert (gemma[0].rope.base, gemma[5].rope.base) == (10_000.0, 1e6)
    assert (gemma[0].rope.scaling, gemma[5].rope.scaling.factor) == (None, 8.0)
    assert attentions("Llama 2")[0].rope.base == 10_000.0


def test_an_idle_window_is_none():
    assert {a.mask.reach[0] for a in attentions("Qwen2.5")} == {None}
    assert {a.mask.reach[0] for a in attentions("Mistral 7B v0.3")} == {None}
    assert {a.mask.reach[0] for a in attentions("Phi-3 mini")} == {2046}


def test_switches_of_single_models():
    assert attentions("Gemma 2 27B")[0].scale == pytest.approx(1 / 12)
    assert attentions("Gemma 2 9B")[0].scale in (None, 1 / 16)
    assert [a.rope is None for a in attentions("SmolLM3")] == [False, False, False, True] * 9
    (rope,) = {a.rope for a in attentions("Phi-4 mini")}
    assert rope.width(128) == 96 and rope.scaling.magnitude == pytest.approx(1.1902, abs=1e-4)
    (mixture,) = {p for b in spec_of("Mixtral 8x7B").blocks() for p in b.parts if type(p) is MoE}
    assert mixture.rule.renormalise and mixture.rule.top_k == 2
