"""isoFLOP curves of MoD, its dense baseline and the stochastic control, in 39 minutes.

The control routes by Gaussian noise instead of learned scores. Without it you could not tell
whether MoD gains by learned routing, or only by seeing more tokens per FLOP.

Command   modjax sweep --config=configs/isoflop_cpu.py --workdir=work/isoflop_cpu --jobs 2
Cost      39 minutes on 2 idle cores
Expected  see experiments/isoflop/README.md, the record of a run
"""

from base import sweep

ARMS = {
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
}


def get_config():
    return sweep(
        ARMS,
        budgets=(2e11, 6e11, 1.8e12),
        optimum={"budget": 6e11, "params": 5e4},
        recipe={"batch_exponent": 0.4},
    )
