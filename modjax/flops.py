"""FLOPs and parameters of a ModelConfig by component; pure Python, no jax.

A multiply-add is 2 FLOPs; attention is counted without causal halving, though modjax.nn skips
most future keys of sequences longer than 128. Components follow Chinchilla (arXiv 2203.15556,
appendix F) and are kept apart so that any published convention can be applied afterwards;
`CONVENTIONS` names those used here.
"""

from collections.abc import Mapping

from modjax.config import GATED_MLPS, ModelConfig

MATMULS = ("qkv", "scores", "values", "output", "mlp", "router", "logits")
CHINCHILLA = ("embedding", "qkv", "scores", "softmax", "values", "output", "mlp", "logits")
CONVENTIONS: dict[str, tuple[str, ...]] = {
    # What the hardware multiplies: budgets are spent in this convention.
    "matmul": MATMULS,
    "all": (*CHINCHILLA, "router"),
    # Appendix F as printed, and what its Table A4 turns out to count.
    "chinchilla": CHINCHILLA,
    "chinchilla_table_a4": ("qkv", "scores", "softmax", "values", "output", "mlp"),
}
# A backward pass costs two forward ones: gradients of activations and of parameters.
TRAIN_OVER_FORWARD = 3


def selected_tokens(capacity: float, seq_len: int) -> int:
    """k, the positions a routed block processes of each sequence: max(1, round(capacity * S))."""
    return max(1, round(capacity * seq_len))


def forward_flops(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Forward FLOPs of one sequence of `seq_len` tokens by component.

    A routed block is a dense block on k tokens: its matrix products scale with k, scores,
    softmax and values with k * k, and its router reads every token (2 S d).
    """
    d, f, h = model.d_model, model.d_ff, model.head_dim
    heads, kv_heads = model.num_heads, model.num_kv_heads
    matrices = 3 if model.mlp in GATED_MLPS else 2
    flops: dict[str, float] = dict.fromkeys((*CHINCHILLA, "router"), 0.0)
    flops["embedding"] = flops["logits"] = 2.0 * seq_len * d * model.vocab_size
    for slot in model.slots:
        routed = slot.kind != "dense"
        tokens = selected_tokens(slot.capacity, seq_len) if routed else seq_len
        block = {
            "qkv": 2.0 * tokens * d * h * (heads + 2 * kv_heads),
            "scores": 2.0 * tokens * tokens * heads * h,
            "softmax": 3.0 * heads * tokens * tokens,
            "values": 2.0 * tokens * tokens * heads * h,
            "output": 2.0 * tokens * heads * h * d,
            "mlp": 2.0 * tokens * matrices * d * f,
            "router": 2.0 * seq_len * d if routed else 0.0,
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
    """Training FLOPs of `sequences` sequences: three times the forward pass."""
    forward = total_flops(forward_flops(model, seq_len), convention)
    return TRAIN_OVER_FORWARD * forward * sequences


def six_nd(model: ModelConfig, tokens: float) -> float:
    """6 N D with N the non-embedding parameters (Kaplan et al., arXiv 2001.08361)."""
    return 6.0 * parameters(model)["non_embedding"] * tokens


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameter counts by component, and three sums.

    `total` counts each tensor once, `non_embedding` leaves out the embedding and the output
    projection, `active` is the share of `non_embedding` used per token: routed blocks count
    with their capacity.
    """
    d, h = model.d_model, model.head_dim
    matrices = 3 if model.mlp in GATED_MLPS else 2
    attention = d * h * (2 * model.num_heads + 2 * model.num_kv_heads)
    block = attention + matrices * d * model.d_ff + 2 * d
    routed = model.num_groups * sum(slot.kind != "dense" for slot in model.slots)
    counts = {
        "embedding": model.vocab_size * d,
        "logits": 0 if model.tie_embeddings else model.vocab_size * d,
        "attention": model.num_layers * attention,
        "mlp": model.num_layers * matrices * d * model.d_ff,
        "norm": (2 * model.num_layers + 1) * d,
        "router": routed * d,
    }
    non_embedding = counts["attention"] + counts["mlp"] + counts["norm"] + counts["router"]
    skipped = model.num_groups * block * sum(1 - slot.capacity for slot in model.slots)
    return counts | {
        "total": sum(counts.values()),
        "non_embedding": non_embedding,
        "active": round(non_embedding - skipped),
    }
