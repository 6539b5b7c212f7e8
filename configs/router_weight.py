"""Six ways to weigh a routed block's update by the router's score, at equal FLOPs.

Command   modjax sweep --config=configs/router_weight.py --workdir=work/router_weight --jobs 2
Cost      see experiments/router_weight/README.md
Expected  differences within the noise of the seeds; the paper's linear weight is among the best
"""

from base import sweep


def mod(settings):
    return {"layers": f"Dense(), MoD(Dense(), capacity=0.125{settings})"}


ARMS = {
    "linear": mod(""),
    "sigmoid": mod(", rule=TopK(weight='sigmoid')"),
    "two_sigmoid": mod(", rule=TopK(weight='two_sigmoid')"),
    "one_plus_tanh": mod(", rule=TopK(weight='one_plus_tanh')"),
    "literal": mod(", residual='literal'"),
    "random": mod(", rule=Random()"),
}


def get_config():
    return sweep(
        ARMS,
        budgets=(3e11,),
        sizes=1,
        seeds=(0, 1, 2),
        optimum={"params": 4e4, "exponent": 0.5},
        shape={"width_multiple": 8},
    )
