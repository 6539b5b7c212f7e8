"""Gaps: the loss and the FLOPs of an arm's optimum against the baseline's, with intervals.

Both optima come from the same bootstrap draws. The gap's interval is that of the difference in each
draw, so noise that moves both losses cancels.
"""

from collections.abc import Mapping, Sequence

from modjax.scaling.fit.bootstrap import interval, power_of_ten
from modjax.scaling.fit.optimum import Vertices
from modjax.scaling.fit.results import Gap, Parabola


def fit_gaps(
    arms: Sequence[str],
    budgets: Sequence[float],
    parabolas: Sequence[Parabola],
    vertices: Vertices,
) -> list[Gap]:
    """Returns the gap of every arm to the baseline, which is arms[0], at every planned budget."""
    found = {(p.arm, p.budget_flops): p for p in parabolas if p.quantity == "parameters"}
    return [
        _gap(arm, arms[0], budget, found, vertices)
        for budget in budgets
        for arm in arms[1:]
        if (arm, budget) in found
    ]


def _gap(
    arm: str,
    baseline: str,
    budget: float,
    parabolas: Mapping[tuple[str, float], Parabola],
    vertices: Vertices,
) -> Gap:
    """Returns one gap. parabolas: those of loss against parameters, by arm and budget."""
    refusals = []
    for name in (baseline, arm):
        if budget not in vertices[name, "parameters"]:
            parabola = parabolas.get((name, budget))
            why = parabola.refusal if parabola else "no runs at this budget"
            refusals.append(f"{name}: {why}")
    if refusals:
        return Gap(arm, baseline, budget, refusal="; ".join(refusals))
    ours, theirs = (vertices[name, "parameters"][budget].loss for name in (arm, baseline))
    flops = [vertices[name, "forward_flops"].get(budget) for name in (arm, baseline)]
    ratio = ratio_interval = None
    if flops[0] and flops[1]:
        x, y = flops[0].log_x, flops[1].log_x
        ratio = 10 ** (x.value - y.value)
        ratio_interval = power_of_ten(interval(x.value_R - y.value_R))
    return Gap(
        arm=arm,
        baseline=baseline,
        budget_flops=budget,
        loss=ours.value - theirs.value,
        loss_interval=interval(ours.value_R - theirs.value_R),
        percent=100 * (ours.value / theirs.value - 1),
        percent_interval=interval(100 * (ours.value_R / theirs.value_R - 1)),
        flops_ratio=ratio,
        flops_ratio_interval=ratio_interval,
    )
