"""Three ways to select without the future, across sizes: predictor, auxiliary loss, threshold.

Command   modjax sweep --config=configs/fig6_autoregressive.py --workdir=work/fig6 --jobs 2
Cost      see experiments/fig6_autoregressive/README.md
Expected  a loss under causal routing within about a hundredth of a nat of that as trained
"""

import ml_collections


def mod(settings: str) -> dict[str, str | float]:
    return {
        "layers": f"Dense(), MoD(Dense(), capacity=0.125{settings})",
        "forward_ratio": 0.7,
    }


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = {"vocab_size": 272}
    config.train = {"seq_len": 128, "b2": 0.98, "eval_sequences": 512}
    config.data = {"name": "stdlib", "vocab": "bytes", "seed": 0, "max_epochs": 1.0}
    config.execution = {"log_every": 50}
    config.sweep = {
        "arms": {
            "dense": {"layers": "Dense()"},
            "predictor": mod(", causal=Predictor()"),
            "auxiliary": mod(", rule=TopK(auxiliary=0.01)"),
            "threshold": mod(""),  # nothing is taught; a running mean of the k-th score decides
        },
        "baseline": "dense",
        "budgets": (6e11,),
        "sizes": 4,
        "spread": 0.45,
        "seeds": (0, 1),
        "optimum": {"budget": 6e11, "params": 5e4, "exponent": 0.6},
        "shape": {"width_multiple": 4, "head_dim": 16, "aspect": 32.0, "layer_multiple": 4},
        "recipe": {"batch_size": 4, "learning_rate": 0.2, "warmup_fraction": 0.05},
        "flops_per_second": 2.5e10,
    }
    return config
