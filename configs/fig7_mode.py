"""Figure 7: experts, MoD, and both together, staged and integrated, at equal training FLOPs.

Two controls. `reduced` executes as many FLOPs as the integrated arm by a smaller capacity of the
experts: it drops tokens instead of letting them choose a no-op. `random` draws no-ops at random.

Command   modjax sweep --config=configs/fig7_mode.py --workdir=work/fig7 --jobs 2
          to check the learning rate: --config=configs/fig7_mode.py:rates --workdir=work/fig7_rates
Cost and expected result: see experiments/fig7_mode/README.md
"""

from base import at_rates, sweep

# Four experts, as the figure draws, each as wide as the dense MLP: a token costs the dense FLOPs.
MOE = "Seq(Attention(), MoE(experts=4))"
MOD = "capacity=0.125, causal=Predictor()"
ARMS = {
    "dense": {"layers": "Dense()"},
    "moe": {"layers": MOE},
    "staged": {"layers": f"{MOE}, MoD({MOE}, {MOD})", "forward_ratio": 0.7},
    "integrated": {
        "layers": "Seq(Attention(), MoE(4, TokenChoice(no_ops=4)))",
        "forward_ratio": 0.8,
    },
    "reduced": {
        "layers": "Seq(Attention(), MoE(experts=4, capacity_factor=0.625))",
        "forward_ratio": 0.8,
    },
    "random": {
        "layers": "Seq(Attention(), MoE(4, TokenChoice(no_ops=4, random_no_ops=True)))",
        "forward_ratio": 0.8,
    },
    "mod12": {"layers": f"Dense(), MoD(Dense(), {MOD})", "forward_ratio": 0.7},
}
RATES = (0.1, 0.2, 0.4)


def get_config(which="arms"):
    if which == "arms":
        return sweep(ARMS, budgets=(1e11, 3e11), recipe={"batch_exponent": 0.4})
    if which == "rates":
        rated = {arm: ARMS[arm] for arm in ("dense", "moe", "integrated")}
        return sweep(at_rates(rated, RATES), budgets=(3e11,), baseline="dense-lr0_2", sizes=1)
    raise ValueError(f"must be arms or rates, not {which!r}")
