"""FLOPs, parameters and bytes of a ModelSpec by component: sums over the costs of its parts.

A multiply-add is 2 FLOPs. Attention is counted without causal halving, though modjax.kernels skips
most future keys of sequences longer than 128. A window counts the keys within its reach. Its kernel
computes more, up to 127 keys per query, or a sixteenth of a sequence longer than 2,048. Components
are those of Chinchilla (arXiv 2203.15556, appendix F), so that any published convention can apply.
"""

from collections.abc import Callable, Iterator, Mapping

from modjax.specs import Cost, Load, ModelSpec, TrainConfig
from modjax.specs.run import ROUTER_ROLES

CHINCHILLA = ("embedding", "qkv", "scores", "softmax", "values", "output", "mlp", "logits")
# Components that every model lists, even at 0 FLOPs.
COMPONENTS = (*CHINCHILLA, "router", "predictor")
# Whether a convention counts a component.
CONVENTIONS: dict[str, Callable[[str], bool]] = {
    "matmul": lambda component: component not in ("embedding", "softmax"),  # used for budgets
    "all": lambda component: True,
    # Appendix F as printed, and as its Table A4 counts.
    "chinchilla": (*CHINCHILLA, "experts").__contains__,
    "chinchilla_table_a4": (*CHINCHILLA[1:-1], "experts").__contains__,
}


def costs(
    model: ModelSpec, seq_len: int, *, in_order: bool = False, trains: bool = True
) -> Iterator[Cost]:
    """Yields the costs of one sequence, part by part. A layer's costs cover all its repetitions.

    in_order: yields each repetition separately, in the order of the model.
    trains: see Load.
    """
    layers = model.repeated()
    if in_order:
        layers = [(part, 1) for s in model.segments for part in s.parts * (s.times or 0)]
    before, after = (((end, 1) for end in ends) for ends in model.ends)
    for part, times in (*before, *layers, *after):
        for cost in part.cost(model.shape, Load(seq_len, seq_len, trains)):
            yield cost._replace(forward=times * cost.forward, params=times * cost.params)


def forward_flops(model: ModelSpec, seq_len: int, *, trains: bool = True) -> dict[str, float]:
    """Returns the forward FLOPs of one sequence of `seq_len` tokens by component.

    trains: see Load.
    """
    flops = {name: 0.0 for name in COMPONENTS}
    for cost in costs(model, seq_len, trains=trains):
        if cost.forward or cost.name in flops:
            flops[cost.name] = flops.get(cost.name, 0.0) + cost.forward
    return flops


def total_flops(components: Mapping[str, float], convention: str = "matmul") -> float:
    """Returns the sum of the components that `convention` counts."""
    return sum(flops for name, flops in components.items() if CONVENTIONS[convention](name))


def train_flops(
    model: ModelSpec, seq_len: int, sequences: int, convention: str = "matmul", trained: str = "all"
) -> float:
    """Returns the training FLOPs of `sequences` sequences.

    A backward pass costs two forward passes, for the gradients of activations and of parameters.
    Frozen layers save the second. Those before the first trained parameters save both.
    """
    found = 0.0
    for name, flops in _train_flops(model, seq_len, trained):
        if CONVENTIONS[convention](name):
            found += flops
    return found * sequences


def causal_train_flops(
    model: ModelSpec, seq_len: int, sequences: int, trained: str = "all"
) -> float:
    """Returns `train_flops` with half of the scores and values, as most others publish them."""
    each = _train_flops(model, seq_len, trained)
    half = sum(flops for name, flops in each if name in ("scores", "values")) / 2
    return train_flops(model, seq_len, sequences, trained=trained) - half * sequences


def _train_flops(model: ModelSpec, seq_len: int, trained: str) -> Iterator[tuple[str, float]]:
    """Yields the component and the training FLOPs of each cost of one sequence."""
    reached = trained == "all"  # whether the first trained parameters are reached
    for cost in costs(model, seq_len, in_order=trained != "all"):  # only frozen layers need order
        backward = cost.backward
        if trained != "all" and cost.params:
            if cost.role not in ROUTER_ROLES:
                backward -= 1  # without the gradient of the parameters
            elif not reached:
                reached, backward = True, 1.0  # nothing before it needs the gradient of its input
        yield cost.name, cost.forward * (1 + (backward if reached else 0.0))


def run_flops(model: ModelSpec, train: TrainConfig, steps: int) -> float:
    """Returns the training FLOPs of a run's first `steps` updates, as budgets count them."""
    per_step = train_flops(model, train.seq_len, train.batch_size, trained=train.trained)
    return steps * per_step


def six_nd(model: ModelSpec, tokens: float) -> float:
    """Returns 6 N D with N the non-embedding parameters (Kaplan et al., arXiv 2001.08361)."""
    return 6.0 * parameters(model)["non_embedding"] * tokens


def parameters(model: ModelSpec) -> dict[str, int]:
    """Returns counts of learned parameters by component, and three sums.

    total: every parameter once.
    non_embedding: total without the role "embedding", which the embedding and the head have.
    active: part of non_embedding that a token uses; a routed layer counts by its capacity.
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
    """Returns the bytes of the caches of one sequence of at most `length` tokens.

    slack: see Layer.cache_numbers.
    """
    each = ((layer.cache_numbers(model.shape, length, slack), n) for layer, n in model.repeated())
    return _bytes(model, sum(numbers * times for numbers, times in each))


def stream_bytes(model: ModelSpec, tokens: int) -> int:
    """Returns the bytes of the inputs of all layers for `tokens` tokens.

    A backward pass needs at least these stored, and little else with Execution.remat "full".
    """
    shape = model.shape
    return _bytes(model, tokens * shape.d_model * shape.streams * shape.num_layers)


def _bytes(model: ModelSpec, numbers: int) -> int:
    return numbers * (2 if model.dtype == "bfloat16" else 4)
