"""Check that one learning rate suits dense and MoD alike: one size, four rates.

Command   modjax sweep --config=configs/learning_rate.py --workdir=work/learning_rate --jobs 2
Cost      see experiments/learning_rate/README.md
Expected  both arms are best at the same rate, the one that the other configs use (0.2)
"""

from base import at_rates, sweep

RATES = (0.05, 0.1, 0.2, 0.4)
ARMS = {
    "dense": {"layers": "Dense()"},
    "mod12": {"layers": "Dense(), MoD(Dense(), capacity=0.125)"},
}


def get_config():
    return sweep(
        at_rates(ARMS, RATES),
        budgets=(3e11,),
        baseline="dense-lr0_2",
        sizes=1,
        optimum={"params": 4e4, "exponent": 0.5},
        shape={"width_multiple": 8},
    )
