"""How far rounding moves a loss: the same runs on 1, 2, 4 and 8 devices.

Command   see experiments/near_ties/README.md
Cost      a minute or two for each number of devices on 2 CPU cores
Expected  as there
"""

import ml_collections

ARMS = {
    "dense": "Dense()",
    "mod12": "Dense(), MoD(Dense(), capacity=0.125)",
    "token-choice": "Seq(Attention(), MoE(experts=4))",
    "expert-choice": "Seq(Attention(), MoE(4, ExpertChoice()))",
}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": {arm: {"layers": layers} for arm, layers in ARMS.items()},
        "baseline": "dense",
        "budgets": (1e11,),
        "sizes": 1,
        "spread": 0.5,
        "seeds": (0, 1),
        "optimum": {"budget": 3e11, "params": 2.6e4, "exponent": 0.6},
        "shape": {"width_multiple": 8, "head_dim": 8, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {"batch_size": 8, "learning_rate": 0.2, "warmup_fraction": 0.05},
        "flops_per_second": 2.5e10,
    }
    return config
