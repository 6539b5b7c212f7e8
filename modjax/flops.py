"""FLOPs and parameters of a ModelConfig by component; pure Python, no jax.

A multiply-add is 2 FLOPs; attention is counted without causal halving, though modjax.nn skips
most future keys of sequences longer than 128. Components follow Chinchilla (arXiv 2203.15556,
appendix F) and are kept apart so that any published convention can be applied afterwards;
`CONVENTIONS` names those used here.
"""

import math
from collections.abc import Mapping

from modjax.config import GATED_MLPS, ModelConfig, TrainConfig

MATMULS = ("qkv", "scores", "values", "output", "mlp", "router", "predictor", "logits")
CHINCHILLA = ("embedding", "qkv", "scores", "softmax", "values", "output", "mlp", "logits")
CONVENTIONS: dict[str, tuple[str, ...]] = {
    # What the hardware multiplies: budgets are spent in this convention.
    "matmul": MATMULS,
    "all": (*CHINCHILLA, "router", "predictor"),
    # Appendix F as printed, and what its Table A4 turns out to count.
    "chinchilla": CHINCHILLA,
    "chinchilla_table_a4": ("qkv", "scores", "softmax", "values", "output", "mlp"),
}
# A backward pass costs two forward ones: gradients of activations and of parameters. A predictor's
# input takes no gradient, so its backward pass costs one.
TRAIN_OVER_FORWARD = 3
# Outputs of the routers that differ from one per position.
ROUTER_OUTPUTS = {"token_choice": 2, "attention": 0}


def predictor_width(d_model: int) -> int:
    """Hidden width of the predictor beside a router (arXiv 2404.02258 leaves it open)."""
    return max(1, d_model // 4)


def cache_slots(capacity: float, length: int, slack: float | None) -> int:
    """Positions that a routed block's cache holds of a sequence of at most `length`.

    slack: None has room for every position; else room for slack * capacity of them.
    """
    if slack is None:
        return length
    return min(length, max(1, math.ceil(slack * capacity * length)))


def cache_bytes(model: ModelConfig, length: int, slack: float | None = None) -> int:
    """Bytes of the key-value caches of one sequence of at most `length` tokens."""
    slots = (cache_slots(s.capacity, length, slack if s.routed else None) for s in model.slots)
    width = 2 * model.num_kv_heads * model.head_dim * (2 if model.dtype == "bfloat16" else 4)
    return model.num_groups * sum(slots) * width


def selected_tokens(capacity: float, seq_len: int) -> int:
    """k, the positions a routed block processes of each sequence: max(1, round(capacity * S))."""
    return max(1, round(capacity * seq_len))


def forward_flops(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward FLOPs of one sequence of `seq_len` tokens by component.

    A routed block is a dense block on k tokens: its matrix products scale with k, scores,
    softmax and values with k * k, and its router and predictor read every token.
    """
    d, f, h = model.d_model, model.d_ff, model.head_dim
    heads, kv_heads = model.num_heads, model.num_kv_heads
    matrices = 3 if model.mlp in GATED_MLPS else 2
    flops: dict[str, float] = dict.fromkeys((*CHINCHILLA, "router", "predictor"), 0.0)
    flops["embedding"] = flops["logits"] = 2.0 * seq_len * d * model.vocab_size
    for slot in model.slots:
        tokens = selected_tokens(slot.room, seq_len) if slot.routed else seq_len
        outputs = ROUTER_OUTPUTS.get(slot.kind, 1) if slot.routed else 0
        hidden = predictor_width(d) if slot.routed and model.mod.predictor_weight > 0 else 0
        block = {
            "qkv": 2.0 * tokens * d * h * (heads + 2 * kv_heads),
            "scores": 2.0 * tokens * tokens * heads * h,
            "softmax": 3.0 * heads * tokens * tokens,
            "values": 2.0 * tokens * tokens * heads * h,
            "output": 2.0 * tokens * heads * h * d,
            "mlp": 2.0 * tokens * matrices * d * f,
            "router": 2.0 * seq_len * d * outputs,
            "predictor": 2.0 * seq_len * (d + 1) * hidden,
        }
        for name, value in block.items():
            flops[name] += model.num_groups * value
    return flops


def total_flops(components: Mapping[str, float], convention: str = "matmul") -> float:
    """Sum of the components that `convention` counts."""
    return sum(components[name] for name in CONVENTIONS[convention])


def train_flops(
    model: ModelConfig, seq_len: int, sequences: int, convention: str = "matmul"
) -> float:
    """Training FLOPs of `sequences` sequences: three times the forward pass, predictors twice."""
    components = forward_flops(model, seq_len)
    once = components["predictor"] if "predictor" in CONVENTIONS[convention] else 0.0
    return (TRAIN_OVER_FORWARD * total_flops(components, convention) - once) * sequences


def run_flops(model: ModelConfig, train: TrainConfig, steps: int) -> float:
    """Training FLOPs of a run's first `steps` updates, in the convention that spends budgets."""
    return steps * train_flops(model, train.seq_len, train.batch_size)


def six_nd(model: ModelConfig, tokens: float) -> float:
    """6 N D with N the non-embedding parameters (Kaplan et al., arXiv 2001.08361)."""
    return 6.0 * parameters(model)["non_embedding"] * tokens


def parameters(model: ModelConfig) -> dict[str, int]:
    """Counts of learned parameters by component, and three sums.

    `total` counts each tensor once, `non_embedding` leaves out the embedding and the output
    projection, `active` is the share of `non_embedding` used per token: routed blocks count
    with their capacity.
    """
    d, h = model.d_model, model.head_dim
    matrices = 3 if model.mlp in GATED_MLPS else 2
    attention = d * h * (2 * model.num_heads + 2 * model.num_kv_heads)
    block = attention + matrices * d * model.d_ff + 2 * d
    routed = [slot for slot in model.slots if slot.routed]
    hidden = predictor_width(d) if model.mod.predictor_weight > 0 else 0
    routers = sum(d * ROUTER_OUTPUTS.get(slot.kind, 1) for slot in routed)
    counts = {
        "embedding": model.vocab_size * d,
        "logits": 0 if model.tie_embeddings else model.vocab_size * d,
        "attention": model.num_layers * attention,
        "mlp": model.num_layers * matrices * d * model.d_ff,
        "norm": (2 * model.num_layers + 1) * d,
        "router": model.num_groups * routers,
        "predictor": model.num_groups * len(routed) * (d * hidden + hidden + 2 * (hidden > 0)),
    }
    non_embedding = sum(counts.values()) - counts["embedding"] - counts["logits"]
    skipped = model.num_groups * block * sum(1 - slot.capacity for slot in model.slots)
    return counts | {
        "total": sum(counts.values()),
        "non_embedding": non_embedding,
        "active": round(non_embedding - skipped),
    }
