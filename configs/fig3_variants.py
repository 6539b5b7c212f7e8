"""Every routing scheme at one budget: learned, random, positional, by attention, by threshold.

Command   modjax sweep --config=configs/fig3_variants.py --workdir=work/fig3_variants --jobs 2
Cost      see experiments/fig3_variants/README.md
Expected  as there: at this scale the schemes differ by less than two seeds do
"""

import ml_collections

ARMS = {
    "dense": {"pattern": ("dense",)},
    "mod12": {"pattern": ("dense", "mod"), "forward_ratio": 0.7},
    "mod50": {"pattern": ("dense", "mod:0.5"), "forward_ratio": 0.85},
    "mod12-every": {"pattern": ("mod",), "forward_ratio": 0.6},
    "random12": {"pattern": ("dense", "stochastic"), "forward_ratio": 0.7},
    "random50": {"pattern": ("dense", "stochastic:0.5"), "forward_ratio": 0.85},
    "positional12": {"pattern": ("dense", "positional"), "forward_ratio": 0.7},
    "learned-position12": {"pattern": ("dense", "learned_position"), "forward_ratio": 0.7},
    "token-choice12": {"pattern": ("dense", "token_choice"), "forward_ratio": 0.7},
    "attention12": {"pattern": ("dense", "attention"), "forward_ratio": 0.7},
    "threshold12": {"pattern": ("dense", "threshold"), "forward_ratio": 0.7},
}
# Learned selections get a predictor, which changes nothing else; the others select causally.
PREDICTED = ("mod12", "mod50", "mod12-every", "attention12")


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272, "mod": {"capacity": 0.125}}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": {
            name: arm | ({"mod": {"predictor_weight": 1.0}} if name in PREDICTED else {})
            for name, arm in ARMS.items()
        },
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
