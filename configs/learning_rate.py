"""Is the sweeps' learning rate fair to both arms? Dense and MoD at one size and four rates.

Command   modjax sweep --config=configs/learning_rate.py --workdir=work/learning_rate --jobs 2
Cost      see experiments/learning_rate/README.md
Expected  both arms are best at the same rate, the one that the other configs use (0.2)
"""

import ml_collections

RATES = (0.05, 0.1, 0.2, 0.4)
LAYERS = {"dense": "Dense()", "mod12": "Dense(), MoD(Dense(), capacity=0.125)"}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": {
            f"{arm}-lr{rate}".replace(".", "_"): {
                "layers": layers,
                "recipe": {"learning_rate": rate},
            }
            for arm, layers in LAYERS.items()
            for rate in RATES
        },
        "baseline": "dense-lr0_2",
        "budgets": (3e11,),
        "sizes": 1,
        "spread": 0.5,
        "seeds": (0, 1),
        "optimum": {"budget": 3e11, "params": 4e4, "exponent": 0.5},
        "shape": {"width_multiple": 8, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {"batch_size": 4, "learning_rate": 0.2, "warmup_fraction": 0.05},
        "flops_per_second": 2.5e10,
    }
    return config
