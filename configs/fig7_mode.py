"""Figure 7: experts, MoD, and both together, staged and integrated, at equal training FLOPs.

Two controls: experts whose capacity is cut to the integrated arm's executed FLOPs, which drops
instead of choosing the residual path, and no-ops that are drawn at random.

Command   modjax sweep --config=configs/fig7_mode.py --workdir=work/fig7 --jobs 2
          the learning rate's check: --config=configs/fig7_mode.py:rates --workdir=work/fig7_rates
Cost      see experiments/fig7_mode/README.md
Expected  as there
"""

import ml_collections

# Four experts as the figure draws, as wide as the dense MLP: a token's FLOPs stay the dense ones.
MOE = "Seq(Attention(), MoE(experts=4))"
MOD = "capacity=0.125, causal=Predictor()"
ARMS = {
    "dense": {"layers": "Dense()"},
    "moe": {"layers": MOE},
    "staged": {"layers": f"{MOE}, MoD({MOE}, {MOD})", "forward_ratio": 0.7},
    "integrated": {
        "layers": "Seq(Attention(), MoE(4, TokenChoice(no_ops=4)))",
        "forward_ratio": 0.8,
    },
    "reduced": {
        "layers": "Seq(Attention(), MoE(experts=4, capacity_factor=0.625))",
        "forward_ratio": 0.8,
    },
    "random": {
        "layers": "Seq(Attention(), MoE(4, TokenChoice(no_ops=4, random_no_ops=True)))",
        "forward_ratio": 0.8,
    },
    "mod12": {"layers": f"Dense(), MoD(Dense(), {MOD})", "forward_ratio": 0.7},
}
RATES = (0.1, 0.2, 0.4)


def rates() -> dict[str, dict]:
    """Three arms, each at every rate."""
    return {
        f"{arm}-lr{rate}".replace(".", "_"): ARMS[arm] | {"recipe": {"learning_rate": rate}}
        for arm in ("dense", "moe", "integrated")
        for rate in RATES
    }


def get_config(which: str = "arms") -> ml_collections.ConfigDict:
    if which not in ("arms", "rates"):
        raise ValueError(f"must be arms or rates, not {which!r}")
    check = which == "rates"
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": rates() if check else ARMS,
        "baseline": "dense-lr0_2" if check else "dense",
        "budgets": (3e11,) if check else (1e11, 3e11),
        "sizes": 1 if check else 5,
        "spread": 0.5,
        "seeds": (0, 1),
        "optimum": {"budget": 3e11, "params": 3.5e4, "exponent": 0.6},
        "shape": {"width_multiple": 4, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {
            "batch_size": 4,
            "batch_exponent": 0.0 if check else 0.4,
            "learning_rate": 0.2,
            "warmup_fraction": 0.05,
        },
        "flops_per_second": 2.5e10,
    }
    return config
