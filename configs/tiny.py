"""The demo: isoFLOP curves of Mixture-of-Depths against its dense baseline, in minutes on a CPU.

Command   make demo     (or: modjax sweep --config=configs/tiny.py --workdir=work/tiny --jobs 2)
Cost      about 7 minutes on 2 cores, after the text is prepared
Expected  three parabolas per arm with their vertex inside the range; at this size expect no
          claim about which arm is better: one seed, and losses of very small models.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}  # 256 bytes and 3 special ids, padded to a multiple of 16
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": {
            "dense": {"layers": "Dense()"},
            "mod12": {
                # The predictor changes nothing else, and lets the model be sampled from.
                "layers": "Dense(), MoD(Dense(), capacity=0.125, causal=Predictor())",
                "forward_ratio": 0.7,  # where its optimum was found to lie at this scale
            },
        },
        "baseline": "dense",
        "budgets": (1e11, 3e11, 9e11),
        "sizes": 5,
        "spread": 0.5,
        "seeds": (0,),
        "optimum": {"budget": 3e11, "params": 3.5e4, "exponent": 0.6},
        "shape": {"width_multiple": 4, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {"batch_size": 4, "learning_rate": 0.2, "warmup_fraction": 0.05},
        "flops_per_second": 2.5e10,
    }
    return config
