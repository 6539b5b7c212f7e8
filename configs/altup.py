"""Alternating Updates and its relatives at equal training FLOPs, alone and with MoD or experts.

The controls:
  sum2           every stream receives every update; only the embedding is wider
  same2          the same stream is always active
  skip4          stride 4 without Sequence-AltUp: other positions skip the layer
  pool4          stride 4, where each fourth position reads the mean of the last four
  mod25          learns which positions to select, as many as seq4 takes by stride

Command   modjax sweep --config=configs/altup.py --workdir=work/altup --jobs 2
          to check the learning rate: --config=configs/altup.py:rates --workdir=work/altup_rates
          with a vocabulary of 8192: --config=configs/altup.py:vocabulary --workdir=work/altup_8192
Cost and expected result: see experiments/altup/README.md
"""

from base import at_rates, sweep


def alternating(layer: str, streams: int, inner: str = "Dense()", more: str = "") -> str:
    return ", ".join(f"{layer}({inner}, active={i}{more})" for i in range(streams))


def connected(layer: str, more: str = "") -> str:
    """Wraps each sublayer: attention reads the first of two streams, the MLP the second."""
    pair = [f"{layer}({part}, active={i}{more})" for i, part in enumerate(("Attention()", "MLP()"))]
    return f"Seq({', '.join(pair)})"


def between(layer: str) -> str:
    """Repeats a layer between a first and a last dense block."""
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
OF_VOCABULARY = ("dense", "recycled2", "full2", "sum2")


def get_config(which="arms"):
    seeds, batch = (0, 1, 2), {"batch_exponent": 0.4}
    if which == "arms":
        return sweep(ARMS, budgets=(5e10, 1.5e11), seeds=seeds, recipe=batch)
    if which == "rates":
        arms = at_rates({arm: ARMS[arm] for arm in RATED}, RATES)
        return sweep(arms, budgets=(1.5e11,), baseline="dense-lr0_2", sizes=1, seeds=seeds)
    if which != "vocabulary":
        raise ValueError(f"must be arms, rates or vocabulary, not {which!r}")
    # A head of 8192 takes most of the FLOPs, so three smaller sizes are added.
    arms = {arm: ARMS[arm] for arm in OF_VOCABULARY}
    optimum = {"params": 3.5e4 * 10**-0.375}
    grid = {"sizes": 8, "spread": 0.875, "optimum": optimum}
    config = sweep(arms, budgets=(6e11, 1.8e12), seeds=seeds, recipe=batch, **grid)
    config.model.vocab_size, config.data.vocab = 8192, "sentencepiece:8192"
    return config
