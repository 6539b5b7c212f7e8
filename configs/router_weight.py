"""How the router's score weighs a routed block's update: six arms at equal FLOPs.

Command   modjax sweep --config=configs/router_weight.py --workdir=work/router_weight --jobs 2
Cost      see experiments/router_weight/README.md
Expected  differences below the noise of a seed; the paper's linear weight is among the best
"""

import ml_collections


def mod(settings: str) -> dict[str, str]:
    return {"layers": f"Dense(), MoD(Dense(), capacity=0.125{settings})"}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": {
            "linear": mod(""),
            "sigmoid": mod(", rule=TopK(weight='sigmoid')"),
            "two_sigmoid": mod(", rule=TopK(weight='two_sigmoid')"),
            "one_plus_tanh": mod(", rule=TopK(weight='one_plus_tanh')"),
            "literal": mod(", residual='literal'"),
            "random": mod(", rule=Random()"),
        },
        "baseline": "linear",
        "budgets": (3e11,),
        "sizes": 1,
        "spread": 0.5,
        "seeds": (0, 1, 2),
        "optimum": {"budget": 3e11, "params": 4e4, "exponent": 0.5},
        "shape": {"width_multiple": 8, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {"batch_size": 4, "learning_rate": 0.2, "warmup_fraction": 0.05},
        "flops_per_second": 2.5e10,
    }
    return config
