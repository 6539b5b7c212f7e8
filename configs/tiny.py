"""The demo: isoFLOP curves of Mixture-of-Depths against its dense baseline, in minutes on a CPU.

Command   make demo     (or: modjax sweep --config=configs/tiny.py --workdir=work/tiny --jobs 2)
Cost      about 5 minutes on 2 cores, after the text is prepared
Expected  three parabolas per arm, each with its minimum inside the range of sizes. The models are
          very small and have one seed, so they cannot show which arm is better.
"""

from base import sweep

ARMS = {
    "dense": {"layers": "Dense()"},
    "mod12": {
        # The predictor changes nothing else, and lets the model be sampled from.
        "layers": "Dense(), MoD(Dense(), capacity=0.125, causal=Predictor())",
        "forward_ratio": 0.7,  # where its optimum was found to lie at this scale
    },
}


def get_config():
    return sweep(ARMS, budgets=(1e11, 3e11, 9e11), seeds=(0,))
