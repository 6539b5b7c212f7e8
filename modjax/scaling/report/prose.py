"""The results of the fits in plain English sentences."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from modjax.records import RunRecord, causal_loss
from modjax.scaling.fit.results import (
    SIZES,
    SURFACE_NAMES,
    Fits,
    Gap,
    NoCausalLoss,
    Parabola,
    PowerLaw,
    Range,
    Surface,
)
from modjax.scaling.formatting import budget, count

KINDS = {
    ("parameters", "non_embedding"): "non-embedding parameters",
    ("parameters", "total"): "total parameters",
    ("parameters", "active"): "active parameters, without embeddings",
    **{("forward_flops", size): "forward FLOPs per token" for size in SIZES},
}
LOSSES = {"trained": "validation loss as trained", "causal": "causal validation loss"}


def fixed(digits: int, sign: str = "") -> Callable[[float], str]:
    """Returns a formatter with `digits` decimals; sign "+" shows the sign of positive values."""
    return lambda value: f"{value:{sign}.{digits}f}"


def span(ends: Range | None, show: Callable[[float], str], unit: str = "") -> str:
    """Returns an interval in words: "1 to 2", "at most 2", or "not determined" without ends."""
    if ends is None:
        return "not known"
    open_low, open_high = open_ends(ends)
    if open_low and open_high:
        return "not determined"
    low, high = show(ends[0]), show(ends[1])
    if open_low:
        return f"at most {high}{unit}"
    return f"at least {low}{unit}" if open_high else f"{low} to {high}{unit}"


def open_ends(ends: Range) -> tuple[bool, bool]:
    """Returns whether each end is open: infinite, or a lower end of 0, which is 10^-infinity."""
    low, high = ends
    return low == -math.inf or low == 0 < high, high == math.inf


def mark(fits: Fits, arm: str) -> str:
    """Returns the arm's name, with a * if the fits compare it by a loss that is not causal."""
    without = fits.loss == "trained" and any(found.arm == arm for found in fits.no_causal_loss)
    return f"{arm}*" if without else arm


def marked(fits: Fits) -> Fits:
    """Returns the fits with `mark` applied to every arm's name."""
    names = {arm: mark(fits, arm) for arm in fits.arms}

    def renamed(results: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(dataclasses.replace(r, arm=names.get(r.arm, r.arm)) for r in results)

    return dataclasses.replace(
        fits,
        arms=tuple(names.values()),
        baseline=names[fits.baseline],
        gaps=renamed(dataclasses.replace(g, baseline=names[g.baseline]) for g in fits.gaps),
        **{
            field: renamed(getattr(fits, field))
            for field in ("parabolas", "laws", "surfaces", "repeats", "no_causal_loss")
        },
    )


def loss_text(r: RunRecord) -> str:
    """Returns the loss of a finished run, or both losses if the causal one differs."""
    assert r.eval_loss is not None
    causal = causal_loss(r)
    if causal == r.eval_loss:
        return f"loss {causal:.4f}"
    said = "no causal loss" if causal is None else f"causal loss {causal:.4f}"
    return f"{said}, as trained {r.eval_loss:.4f}"


def loss_sentence(fits: Fits) -> str:
    """Says by which loss arms are compared."""
    if fits.loss == "trained":
        return (
            "Losses are those of the runs as they were trained, even if training looks ahead or "
            "drops tokens that experts have no slot for."
        )
    routings = [
        f"{', '.join(arms)} {'as trained' if routing == 'trained' else f'by {routing}'}"
        for routing, arms in fits.routings.items()
    ]
    return f"Losses are measured under routing that never looks ahead ({'; '.join(routings)})."


def no_causal_sentence(found: NoCausalLoss, loss: str) -> str:
    """Names runs of `marked` fits that have no causal loss, and says why and what follows."""
    if loss == "trained":
        who = "its" if found.runs == found.finished else f"{found.runs} of its"
        return (
            f"* marks {found.arm}: {who} runs have no causal loss ({found.why}), so sampling "
            "cannot reach their loss as trained."
        )
    who = f"{found.arm} is"
    if found.runs < found.finished:
        verb = "is" if found.runs == 1 else "are"
        who = f"{found.runs} of {found.arm}'s {found.finished} runs {verb}"
    return (
        f"{who} not compared: no causal loss ({found.why}). --loss=trained compares all runs as "
        "they were trained."
    )


def parabola_sentence(p: Parabola, size: str) -> str:
    """Says where an arm's optimum is at one budget, and how far to trust it."""
    kind = KINDS[p.quantity, size]
    where = f"{p.arm} at {budget(p.budget_flops)} FLOPs"
    if p.refusal is not None:
        return f"{where}: no optimum in {kind}: {p.refusal}."
    assert p.optimum is not None and p.loss is not None and p.off_centre is not None
    assert p.low is not None and p.high is not None and p.optimum_interval is not None
    side = "below" if p.off_centre < 0 else "above"
    text = (
        f"{where}: the optimum is {count(p.optimum)} {kind} (95% interval "
        f"{span(p.optimum_interval, count)}), with a loss of {p.loss:.4f} nats per token "
        f"({span(p.loss_interval, fixed(4))}). It lies {abs(p.off_centre):.0%} of the half range "
        f"{side} the centre of the {p.sizes} sampled sizes, {count(p.low)} to {count(p.high)}"
    )
    if abs(p.off_centre) > 0.5:
        text += ", far enough off-centre to bias it"
    beyond = p.optimum_interval[0] < p.low or p.optimum_interval[1] > p.high
    if beyond and not all(open_ends(p.optimum_interval)):
        text += ". Its interval reaches beyond the sampled sizes"
    return f"{text}."


def law_sentence(law: PowerLaw, size: str) -> str:
    """Says how an arm's optimum scales with the budget C."""
    kind = "optimal loss" if law.quantity == "loss" else f"optimal {KINDS[law.quantity, size]}"
    if law.refusal is not None:
        return f"{law.arm}: no power law for the {kind}: {law.refusal}."
    assert law.coefficient is not None and law.exponent is not None
    plural = "s" if law.freedom > 1 else ""
    freedom = f"{law.points} optima, {law.freedom} degree{plural} of freedom"
    if law.freedom == 0:
        freedom = "two points determine it exactly, so nothing tests its form"
    return (
        f"{law.arm}: {kind} = {law.coefficient:.3g} C^{law.exponent:.3f} (exponent's 95% interval "
        f"{span(law.exponent_interval, fixed(3))}; {freedom})."
    )


def gap_sentence(gap: Gap) -> str:
    """Compares the losses and the forward FLOPs of two arms' optima at one budget."""
    where = f"{gap.arm} against {gap.baseline} at {budget(gap.budget_flops)} FLOPs"
    if gap.refusal is not None:
        return f"{where}: no comparison of optima ({gap.refusal})."
    assert gap.loss is not None and gap.loss_interval is not None and gap.percent is not None
    low, high = gap.loss_interval
    ends = span(gap.loss_interval, fixed(4, "+"), " nats")
    if not all(open_ends(gap.loss_interval)):
        ends += ", " + span(gap.percent_interval, fixed(2, "+"), "%")
    text = (
        f"{where}, each at its own optimum: {gap.arm}'s loss is {abs(gap.loss):.4f} nats "
        f"{'lower' if gap.loss < 0 else 'higher'} ({gap.percent:+.2f}%; 95% interval {ends})"
    )
    if low <= 0 <= high:
        text += ", which these runs cannot tell from no difference"
    if gap.flops_ratio is not None:
        text += (
            f". Its optimal model takes {gap.flops_ratio:.2f} times {gap.baseline}'s forward "
            f"FLOPs per token (95% interval {span(gap.flops_ratio_interval, fixed(2))})"
        )
    return f"{text}."


def surface_sentence(surface: Surface) -> str:
    """Gives the five parameters of an arm's loss surface."""
    formula = "L = E + A/N^alpha + B/D^beta"
    if surface.refusal is not None:
        return f"{surface.arm}, all budgets together: no surface {formula}: {surface.refusal}."
    parts = []
    for name in SURFACE_NAMES:
        part = f"{name} {getattr(surface, name):.4g}"
        if surface.intervals:
            part += f" ({span(surface.intervals[name], '{:.3g}'.format)})"
        parts.append(part)
    return (
        f"{surface.arm}, all budgets together, {formula} through {surface.runs} runs (95% "
        f"intervals): {', '.join(parts)}."
    )


def method(fits: Fits) -> str:
    """Says how the intervals were made, and what they leave out."""
    seeds = (
        f"Up to {fits.seeds_per_cell} seeds per cell enter with their mean and their spread."
        if fits.seeds_per_cell > 1
        else "Every cell was run with one seed, so differences between seeds enter only as "
        "scatter about the parabolas."
    )
    return (
        f"{loss_sentence(fits)} Sizes count {KINDS['parameters', fits.size]}. Intervals are 95%, "
        f"from {fits.draws} draws of a parametric bootstrap. Each draw varies the evaluation "
        "error, which all runs share because they are scored on the same text, and the scatter of "
        f"runs about the parabolas of their budget, whose size is itself uncertain. {seeds} A "
        "power law weighs each optimum by its own variance. Each draw leaves out optima that it "
        "does not determine. If the optima scatter about the law more than their variances "
        "explain, the law's interval is that of this scatter. An interval that is open at both "
        "ends is called not determined. Diverged runs are left out of every fit."
    )


def sentences(fits: Fits) -> list[str]:
    """Returns one text per result: gaps, optima, power laws, surfaces, diverged runs."""
    said = [gap_sentence(gap) for gap in fits.gaps]
    said += [parabola_sentence(p, fits.size) for p in fits.parabolas]
    said += [law_sentence(law, fits.size) for law in fits.laws]
    said += [surface_sentence(surface) for surface in fits.surfaces]
    if fits.diverged:
        said.append(f"Diverged and left out of every fit: {', '.join(fits.diverged)}.")
    return said
