"""Effect of rounding on a loss: the same runs on 1, 2, 4 and 8 devices.

Command   see experiments/near_ties/README.md
Cost      a minute or two for each number of devices on 2 CPU cores
Expected  see the same README
"""

from base import sweep

ARMS = {
    "dense": {"layers": "Dense()"},
    "mod12": {"layers": "Dense(), MoD(Dense(), capacity=0.125)"},
    "token-choice": {"layers": "Seq(Attention(), MoE(experts=4))"},
    "expert-choice": {"layers": "Seq(Attention(), MoE(4, ExpertChoice()))"},
}


def get_config():
    return sweep(
        ARMS,
        budgets=(1e11,),
        sizes=1,
        optimum={"params": 2.6e4},
        shape={"width_multiple": 8, "head_dim": 8},
        recipe={"batch_size": 8},
    )
