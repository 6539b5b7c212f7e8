"""Alternating Updates and its relatives at equal training FLOPs, alone and with MoD or experts.

The controls: `sum`, every stream receives every update and only the embedding is wider; `same`, one
stream is always the active one; `skip4` and `pool4`, Sequence-AltUp without its correction or with
averages; `mod25`, a learned choice of as many positions as Sequence-AltUp 4 takes by stride.

Command   modjax sweep --config=configs/altup.py --workdir=work/altup --jobs 2
          the learning rate's check: --config=configs/altup.py:rates --workdir=work/altup_rates
          with a vocabulary of 8192: --config=configs/altup.py:vocabulary --workdir=work/altup_8192
Cost      see experiments/altup/README.md
Expected  as there
"""

import ml_collections


def alternating(layer: str, streams: int, inner: str = "Dense()", more: str = "") -> str:
    return ", ".join(f"{layer}({inner}, active={i}{more})" for i in range(streams))


def connected(layer: str, more: str = "") -> str:
    """Around each sublayer, the first reading one of two streams, the second the other."""
    pair = [f"{layer}({part}, active={i}{more})" for i, part in enumerate(("Attention()", "MLP()"))]
    return f"Seq({', '.join(pair)})"


def between(layer: str) -> str:
    """The first and the last block whole."""
    return f"Repeat(Dense(), times=1), Repeat({layer}), Repeat(Dense(), times=1)"


TAUGHT = "capacity={}, causal=Predictor()"
MOD12 = f"MoD(Dense(), {TAUGHT.format(0.125)})"
MOE = "Seq(Attention(), MoE(experts=4))"
TWO, FOUR = {"streams": "Recycled(2)"}, {"streams": "Recycled(4)"}
LESS = {"forward_ratio": 0.75}
ARMS = {
    "dense": {"layers": "Dense()"},
    "recycled2": {"layers": alternating("AltUp", 2)} | TWO,
    "recycled4": {"layers": alternating("AltUp", 4)} | FOUR,
    "full2": {"layers": alternating("AltUp", 2), "streams": "Full(2)"},
    "same2": {"layers": "AltUp(Dense())"} | TWO,
    "sum2": {"layers": alternating("AltUp", 2, more=", learned=False"), "streams": "Full(2)"},
    "simplified4": {"layers": alternating("SimplifiedAltUp", 4)} | FOUR,
    "static2": {"layers": connected("HyperConnection")} | TWO,
    "dynamic2": {"layers": connected("HyperConnection", ", dynamic=True")} | TWO,
    "manifold2": {"layers": connected("ManifoldHyperConnection")} | TWO,
    "seq2": {"layers": between("SequenceAltUp(Dense(), stride=2)"), "forward_ratio": 0.85},
    "seq4": {"layers": between("SequenceAltUp(Dense(), stride=4)")} | LESS,
    "skip4": {"layers": between("StrideSkip(Dense(), stride=4)")} | LESS,
    "pool4": {"layers": between("StridePool(Dense(), stride=4)")} | LESS,
    "mod25": {"layers": between(f"MoD(Dense(), {TAUGHT.format(0.25)})")} | LESS,
    "mod12": {"layers": f"Dense(), {MOD12}"} | LESS,
    "altup-mod12": {"layers": f"AltUp(Dense()), AltUp({MOD12}, active=1)"} | TWO | LESS,
    "moe": {"layers": MOE},
    "altup-moe": {"layers": alternating("AltUp", 2, MOE)} | TWO,
}
RATES = (0.1, 0.2, 0.4)
RATED = ("dense", "recycled2", "full2", "simplified4", "static2", "dynamic2", "manifold2")
OF_VOCABULARY = {arm: ARMS[arm] for arm in ("dense", "recycled2", "full2", "sum2")}


def rates() -> dict[str, dict]:
    """Seven arms, each at every rate."""
    return {
        f"{arm}-lr{rate}".replace(".", "_"): ARMS[arm] | {"recipe": {"learning_rate": rate}}
        for arm in RATED
        for rate in RATES
    }


def get_config(which: str = "arms") -> ml_collections.ConfigDict:
    if which not in ("arms", "rates", "vocabulary"):
        raise ValueError(f"must be arms, rates or vocabulary, not {which!r}")
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": {"rates": rates(), "vocabulary": OF_VOCABULARY}.get(which, ARMS),
        "baseline": "dense",
        "budgets": (5e10, 1.5e11),
        "sizes": 5,
        "spread": 0.5,
        "seeds": (0, 1, 2),
        "optimum": {"budget": 3e11, "params": 3.5e4, "exponent": 0.6},
        "shape": {"width_multiple": 4, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {
            "batch_size": 4,
            "batch_exponent": 0.4,
            "learning_rate": 0.2,
            "warmup_fraction": 0.05,
        },
        "flops_per_second": 2.5e10,
    }
    if which == "rates":
        config.sweep.update({"baseline": "dense-lr0_2", "budgets": (1.5e11,), "sizes": 1})
        config.sweep.recipe.batch_exponent = 0.0
    if which == "vocabulary":
        config.model.vocab_size, config.data.vocab = 8192, "sentencepiece:8192"
        # A head of 8192 takes most of the FLOPs: three sizes more, all below.
        config.sweep.update({"budgets": (6e11, 1.8e12), "sizes": 8, "spread": 0.875})
        config.sweep.optimum.params *= 10**-0.375
    return config
