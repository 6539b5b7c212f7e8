"""Every routing scheme at one budget: learned, random, positional, by attention, by threshold.

Command   modjax sweep --config=configs/fig3_variants.py --workdir=work/fig3_variants --jobs 2
Cost      see experiments/fig3_variants/README.md
Expected  as there: learning pays with half of the positions, and hardly with an eighth
"""

import ml_collections

# Learned selections get a predictor, which changes nothing else; the others select causally.
PREDICTED = "causal=Predictor()"
ARMS = {
    "dense": {"layers": "Dense()"},
    "mod12": {"layers": f"Dense(), MoD(Dense(), {PREDICTED})", "forward_ratio": 0.7},
    "mod50": {
        "layers": f"Dense(), MoD(Dense(), capacity=0.5, {PREDICTED})", "forward_ratio": 0.85,
    },
    "mod12-every": {"layers": f"MoD(Dense(), {PREDICTED})", "forward_ratio": 0.6},
    "random12": {"layers": "Dense(), MoD(Dense(), rule=Random())", "forward_ratio": 0.7},
    "random50": {
        "layers": "Dense(), MoD(Dense(), capacity=0.5, rule=Random())",
        "forward_ratio": 0.85,
    },
    "positional12": {"layers": "Dense(), MoD(Dense(), rule=Positional())", "forward_ratio": 0.7},
    "learned-position12": {
        "layers": "Dense(), MoD(Dense(), router=Sinusoids())", "forward_ratio": 0.7,
    },
    "token-choice12": {
        "layers": "Dense(), MoD(Dense(), rule=Binary())", "forward_ratio": 0.7,
    },
    "attention12": {
        "layers": "Seq(Attention(received=True), MLP()), "
        f"MoD(Dense(), router=Received(), rule=TopK('one'), {PREDICTED})",
        "forward_ratio": 0.7,
    },
    "threshold12": {"layers": "Dense(), MoD(Dense(), rule=Threshold())", "forward_ratio": 0.7},
}  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": ARMS,
        "baseline": "dense",
        "budgets": (3e11,),
        "sizes": 4,
        "spread": 0.45,
        "seeds": (0, 1),
        "optimum": {"budget": 3e11, "params": 3.5e4, "exponent": 0.6},
        "shape": {"width_multiple": 4, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {"batch_size": 4, "learning_rate": 0.2, "warmup_fraction": 0.05},
        "flops_per_second": 2.5e10,
    }
    return config
