"""Every routing scheme at one budget: learned, random, positional, by attention, by threshold.

Command   modjax sweep --config=configs/fig3_variants.py --workdir=work/fig3_variants --jobs 2
Cost      see experiments/fig3_variants/README.md
Expected  learning helps at half of the positions, and hardly at an eighth; see the same README
"""

from base import sweep

# Learned selections get a predictor, which changes nothing else; the others select causally.
PREDICTED = "causal=Predictor()"
ARMS = {
    "dense": {"layers": "Dense()"},
    "mod12": {"layers": f"Dense(), MoD(Dense(), {PREDICTED})", "forward_ratio": 0.7},
    "mod50": {
        "layers": f"Dense(), MoD(Dense(), capacity=0.5, {PREDICTED})",
        "forward_ratio": 0.85,
    },
    "mod12-every": {"layers": f"MoD(Dense(), {PREDICTED})", "forward_ratio": 0.6},
    "random12": {"layers": "Dense(), MoD(Dense(), rule=Random())", "forward_ratio": 0.7},
    "random50": {
        "layers": "Dense(), MoD(Dense(), capacity=0.5, rule=Random())",
        "forward_ratio": 0.85,
    },
    "positional12": {"layers": "Dense(), MoD(Dense(), rule=Positional())", "forward_ratio": 0.7},
    "learned-position12": {
        "layers": "Dense(), MoD(Dense(), router=Sinusoids())",
        "forward_ratio": 0.7,
    },
    "token-choice12": {"layers": "Dense(), MoD(Dense(), rule=Binary())", "forward_ratio": 0.7},
    "attention12": {
        "layers": "Seq(Attention(received=True), MLP()), "
        f"MoD(Dense(), router=Received(), rule=TopK('one'), {PREDICTED})",
        "forward_ratio": 0.7,
    },
    "threshold12": {"layers": "Dense(), MoD(Dense(), rule=Threshold())", "forward_ratio": 0.7},
}


def get_config():
    return sweep(ARMS, budgets=(3e11,), sizes=4, spread=0.45)
