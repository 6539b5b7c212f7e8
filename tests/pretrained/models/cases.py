"""Models that are compared with Hugging Face's, by name."""

from typing import Any

from tests.pretrained.models.small_models import (
    FAMILIES,
    FULL,
    GEMMA3_ROPE,
    SLIDING,
    THETA,
    WINDOW,
    Case,
)


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
            "num_experts_per_tok": 2,
        },
        old=True,
    ),
}
