"""FLOPs and parameters of a ModelSpec by component: sums over the costs of its parts.

A multiply-add is 2 FLOPs; attention is counted without causal halving, though modjax.kernels skips
most future keys of sequences longer than 128. A window counts its own keys, though up to 127 more
are computed, or a sixteenth of a sequence longer than 2,048. Components follow Chinchilla
(arXiv 2203.15556, appendix F) and are kept apart so that any published convention can be applied
afterwards.
"""

from collections.abc import Iterator, Mapping

from modjax.spec import Cost, Load, ModelSpec, TrainConfig
from modjax.spec.run import ROUTER_ROLES

# What no matrix unit does.
NOT_MULTIPLIED = ("embedding", "softmax")
CHINCHILLA = ("embedding", "qkv", "scores", "softmax", "values", "output", "mlp", "logits")
# Every dense component is listed, even where a model has none of it.
COMPONENTS: tuple[str, ...] = (*CHINCHILLA, "router", "predictor")
# The components that each convention counts; None: all, but those of NOT_MULTIPLIED for "matmul",
# what the hardware multiplies: budgets are spent in it.
CONVENTIONS: dict[str, tuple[str, ...] | None] = {
    "matmul": None,
    "all": None,
    # Appendix F as printed, and what its Table A4 turns out to count.
    "chinchilla": (*CHINCHILLA, "experts"),
    "chinchilla_table_a4": ("qkv", "scores", "softmax", "values", "output", "mlp", "experts"),
}


def counts(convention: str, component: str) -> bool:
    """Whether the convention counts the component."""
    named = CONVENTIONS[convention]
    if named is None:
        return convention == "all" or component not in NOT_MULTIPLIED
    return component in named


def costs(model: ModelSpec, seq_len: int, *, in_order: bool = False) -> Iterator[Cost]:
    """Yields the costs of one sequence, part by part; a layer's are multiplied by its repetitions.

    in_order: each repetition by itself.
    """
    segments = ((segment.parts, segment.times or 0) for segment in model.segments)
    one_by_one = ((part, 1) for parts, times in segments for part in parts * times)
    layers = one_by_one if in_order else model.repeated()
    before, after = (((end, 1) for end in ends) for ends in model.ends)
    for part, times in (*before, *layers, *after):
        for cost in part.cost(model.shape, Load(seq_len, seq_len)):
            yield cost._replace(forward=times * cost.forward, params=times * cost.params)


def forward_flops(model: ModelSpec, seq_len: int) -> dict[str, float]:
    """Forward FLOPs of one sequence of `seq_len` tokens by component."""
    flops = {name: 0.0 for name in COMPONENTS}
    for cost in costs(model, seq_len):
        if cost.forward or cost.name in flops:
            flops[cost.name] = flops.get(cost.name, 0.0) + cost.forward
    return flops


def total_flops(components: Mapping[str, float], convention: str = "matmul") -> float:
    """Sum of the components that `convention` counts."""
    return sum(flops for name, flops in components.items() if counts(convention, name))


def train_flops(
    model: ModelSpec,
    seq_len: int,
    sequences: int,
    convention: str = "matmul",
    trained: str = "all",
) -> float:
    """Training FLOPs of `sequences` sequences.

    A backward pass costs two forward ones, gradients of activations and of parameters. What is
    frozen saves the second; before the first layer that has something to train, both.
    """
    found, begun = 0.0, trained == "all"
    for cost in costs(model, seq_len, in_order=trained != "all"):  # only the frozen depend on it
        mine = trained == "all" or cost.role in ROUTER_ROLES
        backward = cost.backward if mine else cost.backward - (cost.params > 0)
        if mine and not begun and cost.params:
            begun, backward = True, 1.0  # nothing before it wants its input's gradient
        if counts(convention, cost.name):
            found += cost.forward * (1 + backward * begun)
    return found * sequences


def run_flops(model: ModelSpec, train: TrainConfig, steps: int) -> float:
    """Training FLOPs of a run's first `steps` updates, in the convention that spends budgets."""
    per_step = train_flops(model, train.seq_len, train.batch_size, trained=train.trained)
    return steps * per_step


def six_nd(model: ModelSpec, tokens: float) -> float:
    """6 N D with N the non-embedding parameters (Kaplan et al., arXiv 2001.08361)."""
    return 6.0 * parameters(model)["non_embedding"] * tokens


def parameters(model: ModelSpec) -> dict[str, int]:
    """Returns counts of learned parameters by component, and three sums.

    `total` counts each tensor once, `non_embedding` leaves out those of the role "embedding", which
    are the embedding and the head, `active` is the share of `non_embedding` used per token: a
    routed layer counts with its capacity.
    """
    found: dict[str, int] = {"embedding": 0, "logits": 0, "norm": 0}
    active, embedding = 0.0, 0
    for cost in costs(model, 1):
        if cost.params or cost.name in found:
            found[cost.name] = found.get(cost.name, 0) + cost.params
        if cost.role == "embedding":
            embedding += cost.params
        else:
            active += cost.params * cost.active
    total = sum(found.values())
    return found | {"total": total, "non_embedding": total - embedding, "active": round(active)}


def cache_bytes(model: ModelSpec, length: int, slack: float | None = None) -> int:
    """Bytes of the caches of one sequence of at most `length` tokens."""
    numbers = sum(
        times * layer.cache_numbers(model.shape, length, slack) for layer, times in model.repeated()
    )
    return numbers * _bytes(model)


def stream_bytes(model: ModelSpec, tokens: int) -> int:
    """Bytes of the residual streams, all of them, that so many tokens leave between the layers.

    The least that a backward pass keeps; with Execution.remat "full" little else.
    """
    shape = model.shape
    numbers = tokens * shape.d_model * shape.streams * shape.num_layers
    return numbers * _bytes(model)


def _bytes(model: ModelSpec) -> int:
    """Of a number of its activations."""
    return 2 if model.dtype == "bfloat16" else 4
