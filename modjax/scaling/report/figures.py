"""The figures of a sweep, 10 cm wide for print, as PNG and SVG; markers.py says how they look.

Figures use matplotlib's objects, never pyplot: no global state and no window.
"""

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from modjax.records import RunRecord
from modjax.scaling.fit.learning_curves import SHARE, Curve, frontier
from modjax.scaling.fit.results import Fits, quantity_of
from modjax.scaling.formatting import budget, count
from modjax.scaling.report.comparison import LOSSES
from modjax.scaling.report.markers import (
    INK,
    MANY,
    RC,
    SURFACE,
    WIDTH,
    draw_curves,
    draw_parabola,
    draw_point,
    draw_runs,
    legend,
    log_ticks,
    style,
    trace,
)
from modjax.scaling.report.prose import KINDS


def draw_all(
    records: Sequence[RunRecord], fits: Fits, curves: Sequence[Curve], folder: Path
) -> dict[str, Path]:
    """Draws every figure as PNG (300 dpi) and SVG; returns the SVG of each by name.

    Up to MANY runs have marks of their own, with their id; more are pixels, one artist per arm.
    """
    folder.mkdir(exist_ok=True)  # no parents: a sweep's folder that was deleted stays so
    figures = {
        "isoflop": lambda: isoflop_figure(records, fits),
        "normalised": lambda: normalised_figure(records, fits),
        "curves": lambda: curves_figure(curves, fits),
        "optima": lambda: optima_figure(fits),
    }
    paths = {}
    for name, draw in figures.items():
        with rc_context({**RC, "svg.hashsalt": name}):
            figure = draw()
            if figure is None:
                for kind in ("png", "svg"):  # of an earlier report
                    (folder / f"{name}.{kind}").unlink(missing_ok=True)
                continue
            layout = figure.get_layout_engine()
            assert layout is not None
            layout.execute(figure)  # once; each file would do it again, after a draw for nothing
            figure.set_layout_engine(None)
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        paths[name] = folder / f"{name}.svg"
    return paths


def isoflop_figure(records: Sequence[RunRecord], fits: Fits) -> Figure:
    """Loss against parameters, one panel per budget, with parabolas and optima."""
    columns = 2 if len(fits.budgets) == 4 else min(3, len(fits.budgets))
    lines = math.ceil(len(fits.budgets) / columns)
    figure = Figure(figsize=(WIDTH, 0.35 + 2.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(fits.budgets) :]:
        ax.remove()
    for ax, flops in zip(axes, fits.budgets, strict=False):
        ax.set_title(f"{budget(flops)} FLOPs")
        here = [r for r in records if r.budget_flops == flops]
        xs = [quantity_of(r, "parameters", fits.size) for r in here]
        spread = max(xs) / min(xs)
        log_ticks(ax, (1,) if spread > 300 else (1, 3) if spread > 8 else (1, 2, 5))
        refusals = []
        for arm in fits.arms:
            parabola = fits.parabola(arm, flops, "parameters")
            if parabola is not None and parabola.refusal is None:
                draw_parabola(ax, fits, parabola)
            elif parabola is not None:
                refusals.append(f"{arm} refused: {_short(parabola.refusal)}")
            runs = [
                (
                    r.run_id,
                    quantity_of(r, "parameters", fits.size),
                    r.eval_loss if r.status == "finished" else None,
                )
                for r in here
                if r.variant == arm
            ]
            draw_runs(ax, fits, arm, runs, together=len(records) > MANY)
        ax.margins(x=0.06, y=0.14)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        low, high = ax.get_ylim()
        if len(refusals) > 3:  # no room; the report has their reasons
            refusals = [f"{len(refusals)} arms refused"]
        text = "\n".join(textwrap.fill(refusal, 22) for refusal in refusals)
        ax.annotate(
            text, (0.5, 0.985), xycoords="axes fraction", ha="center", va="top", fontsize=5.5
        )
        above = 0.085 * (1 + text.count("\n")) if refusals else 0
        ax.set_ylim(low - 0.1 * (high - low), high + above * (high - low))
    figure.supxlabel(KINDS["parameters", fits.size].capitalize(), fontsize=7)
    figure.supylabel(f"{LOSSES[fits.loss].capitalize()} (nats per token)", fontsize=7)
    legend(figure, fits, fits.arms, diverged=bool(fits.diverged))
    return figure


def normalised_figure(records: Sequence[RunRecord], fits: Fits) -> Figure:
    """Loss over the optimal baseline's against forward FLOPs over the optimal baseline's."""
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    ax = figure.subplots()
    shades = {}
    for i, flops in enumerate(fits.budgets):
        best = fits.parabola(fits.baseline, flops, "forward_flops")
        if best is None or best.optimum is None or best.loss is None:
            continue
        strength = shades[flops] = 0.3 + 0.7 * (i + 1) / len(fits.budgets)
        for arm in fits.arms:
            colour, _, line = style(fits, arm)
            parabola = fits.parabola(arm, flops, "forward_flops")
            if parabola is not None and parabola.refusal is None:
                x, y = trace(parabola)
                ax.plot(
                    x / best.optimum,
                    y / best.loss,
                    color=colour,
                    alpha=strength,
                    linestyle=line,
                    linewidth=0.9,
                )
            runs = [
                (r.run_id, r.forward_flops_per_token / best.optimum, r.eval_loss / best.loss)
                for r in records
                if (r.variant, r.budget_flops) == (arm, flops) and r.eval_loss is not None
            ]
            draw_runs(ax, fits, arm, runs, strength, together=len(records) > MANY)
    if not shades:
        ax.set_axis_off()
        ax.text(
            0.5,
            0.5,
            f"No budget has an accepted optimum of {fits.baseline}\nto compare with.",
            ha="center",
            va="center",
            transform=ax.transAxes,
        )
        return figure
    ax.axhline(1, color=INK, linewidth=0.5, zorder=0)
    ax.axvline(1, color=INK, linewidth=0.5, zorder=0)
    log_ticks(ax, (1, 2, 5), lambda x, _: f"{x:g}")
    ax.set_xlabel(f"Forward FLOPs per token, relative to the optimal {fits.baseline} model")
    loss = LOSSES[fits.loss].capitalize()
    ax.set_ylabel(f"{loss},\nrelative to the optimal {fits.baseline} model")
    handles = [
        Line2D(
            [],
            [],
            color=INK,
            alpha=shade,
            linestyle="",
            marker="o",
            markeredgewidth=0,
            label=f"{budget(b)} FLOPs",
        )
        for b, shade in shades.items()
    ]
    ax.legend(
        handles=handles,
        loc="upper center",
        handletextpad=0,
        frameon=True,
        facecolor=SURFACE,
        edgecolor="none",
        framealpha=1,
    )
    legend(figure, fits, fits.arms)
    return figure


def curves_figure(curves: Sequence[Curve], fits: Fits) -> Figure | None:
    """Smooth training loss against training FLOPs: all runs thin, each arm's frontier thick."""
    curves = [curve for curve in curves if len(curve.smooth[0])]
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    ax = figure.subplots()
    by_arm = {arm: [curve for curve in curves if curve.arm == arm] for arm in fits.arms}
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    for arm, found in by_arm.items():
        lines = [(curve.run_id, *curve.smooth) for curve in found]
        draw_curves(ax, fits, arm, lines, together=len(curves) > MANY)
        least = frontier(found)
        if least is not None:
            colour, _, dashes = style(fits, arm)
            ax.plot(*least, color=colour, linestyle=dashes, linewidth=1.5, zorder=3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    highest = max(curve.smooth[1].max() for curve in curves)
    diverged = set(fits.diverged)
    last = {curve.run_id: curve.smooth[1][-1] for curve in curves}
    ends = [loss for run_id, loss in last.items() if run_id not in diverged] or last.values()
    ax.set_ylim(0.97 * min(ends), min(highest, 2 * max(ends)))
    first = min(curve.smooth[0][0] for curve in curves)
    ax.set_xlim(max(first, min(fits.budgets) / 100), 1.1 * max(fits.budgets))
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(
        FixedLocator([float(t) for t in MaxNLocator(6).tick_values(low, high)[1:-1]])
    )
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.set_xlabel("Training FLOPs")
    ax.set_ylabel(f"Training loss (nats per token),\nmean over {SHARE:.0%} of the run's steps")
    legend(figure, fits, list(by_arm), marker=False)
    return figure


def optima_figure(fits: Fits) -> Figure | None:
    """Optimal size with its power law, and the gap to the baseline, against the budget."""
    if len(fits.budgets) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
    sizes, gaps = figure.subplots(1, 2)
    spread = np.array([min(fits.budgets) / 1.3, max(fits.budgets) * 1.3])
    values = []
    for arm, law in itertools.product(fits.arms, fits.laws):
        if (law.arm, law.quantity) != (arm, "parameters"):
            continue
        colour, _, line = style(fits, arm)
        if law.coefficient is not None and law.exponent is not None:
            sizes.plot(spread, law.coefficient * spread**law.exponent, color=colour, linestyle=line)
    for p in fits.parabolas:
        if p.quantity == "parameters" and p.optimum is not None:
            values.append(p.optimum)
            draw_point(sizes, fits, p.arm, p.budget_flops, p.optimum, p.optimum_interval)
    if values:
        sizes.set_yscale("log")
        sizes.set_ylim(min(values) / 2, max(values) * 2)
        sizes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        sizes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count(y)))
        sizes.yaxis.set_minor_formatter(NullFormatter())
    sizes.set_ylabel(f"Optimal\n{KINDS['parameters', fits.size]}")
    gaps.axhline(0, color=style(fits, fits.baseline)[0], linewidth=1.1)
    others = [arm for arm in fits.arms if arm != fits.baseline]
    for gap in fits.gaps:
        if gap.percent is not None:
            shift = 1.06 ** (others.index(gap.arm) - (len(others) - 1) / 2)
            draw_point(
                gaps, fits, gap.arm, gap.budget_flops * shift, gap.percent, gap.percent_interval
            )
    gaps.set_ylabel(f"Loss at the optimum\nagainst {fits.baseline}'s (%)")
    gaps.margins(y=0.15)
    for ax in (sizes, gaps):
        ax.set_xscale("log")
        ax.set_xlim(*spread)
        ax.xaxis.set_major_locator(FixedLocator(list(fits.budgets)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: budget(x)))
        ax.xaxis.set_minor_locator(FixedLocator([]))
        ax.set_xlabel("Budget (training FLOPs)")
    legend(figure, fits, fits.arms)
    return figure


def _short(refusal: str | None) -> str:
    """The first clause of a refusal."""
    return "" if refusal is None else refusal.split(";")[0].split(":")[0].split(",")[0]
