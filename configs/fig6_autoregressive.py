"""Three ways to select without the future, across sizes: predictor, auxiliary loss, threshold.

Command   modjax sweep --config=configs/fig6_autoregressive.py --workdir=work/fig6 --jobs 2
Cost      see experiments/fig6_autoregressive/README.md
Expected  the loss under causal routing is within about 0.01 nats of the loss as trained
"""

from base import sweep


def mod(settings):
    return {"layers": f"Dense(), MoD(Dense(), capacity=0.125{settings})", "forward_ratio": 0.7}


ARMS = {
    "dense": {"layers": "Dense()"},
    "predictor": mod(", causal=Predictor()"),
    "auxiliary": mod(", rule=TopK(auxiliary=0.01)"),
    "threshold": mod(""),  # no training; a running mean of the k-th score decides
}


def get_config():
    optimum = {"budget": 6e11, "params": 5e4}
    return sweep(ARMS, budgets=(6e11,), sizes=4, spread=0.45, optimum=optimum)
