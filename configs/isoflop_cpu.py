"""isoFLOP curves of MoD, its dense baseline and the stochastic control, in about an hour.

The control routes by Gaussian noise instead of learned scores: without it a gain of MoD can't be
told from the gain of seeing more tokens per FLOP.

Command   modjax sweep --config=configs/isoflop_cpu.py --workdir=work/isoflop_cpu --jobs 2
Cost      about an hour on 2 cores
Expected  see experiments/isoflop/README.md, the record of a run
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
            "random12": {
                "layers": "Dense(), MoD(Dense(), capacity=0.125, rule=Random())",
                "forward_ratio": 0.7,
            },
        },
        "baseline": "dense",
        "budgets": (2e11, 6e11, 1.8e12),
        "sizes": 5,
        "spread": 0.5,
        "seeds": (0, 1),
        "optimum": {"budget": 6e11, "params": 5e4, "exponent": 0.6},
        "shape": {"width_multiple": 4, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {
            "batch_size": 4,
            "batch_exponent": 0.4,
            "learning_rate": 0.2,
            "warmup_fraction": 0.05,
        },
        "flops_per_second": 2.5e10,
    }
    return config
