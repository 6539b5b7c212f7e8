"""The figures of a sweep, 10 cm wide for print, as PNG and SVG; markers.py draws their parts.

Figures use matplotlib's objects, never pyplot: no global state and no window.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from modjax.records import RunRecord
from modjax.scaling.fit.cells import quantity_of
from modjax.scaling.fit.results import Fits, Parabola
from modjax.scaling.formatting import budget, count
from modjax.scaling.report import markers
from modjax.scaling.report.learning_curves import SHARE, Curve, frontier
from modjax.scaling.report.prose import KINDS, LOSSES


def draw_all(
    records: Sequence[RunRecord], fits: Fits, curves: Sequence[Curve], folder: Path
) -> dict[str, Path]:
    """Draws every figure as PNG (300 dpi) and SVG. Returns the SVG of each by name.

    Up to MANY runs have a mark each, with its id. More are rasterised, as one artist per arm.
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
        with rc_context({**markers.RC, "svg.hashsalt": name}):
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
    """Draws loss against parameters, one panel per budget, with parabolas and optima."""
    columns = 2 if len(fits.budgets) == 4 else min(3, len(fits.budgets))
    lines = math.ceil(len(fits.budgets) / columns)
    figure = Figure(figsize=(markers.WIDTH, 0.35 + 2.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(fits.budgets) :]:
        ax.remove()
    for ax, flops in zip(axes, fits.budgets, strict=False):
        here = [r for r in records if r.budget_flops == flops]
        _isoflop_panel(ax, here, fits, flops, together=len(records) > markers.MANY)
    figure.supxlabel(KINDS["parameters", fits.size].capitalize(), fontsize=7)
    figure.supylabel(f"{LOSSES[fits.loss].capitalize()} (nats per token)", fontsize=7)
    markers.legend(figure, fits, fits.arms, diverged=bool(fits.diverged))
    return figure


def _isoflop_panel(
    ax: Axes, records: Sequence[RunRecord], fits: Fits, flops: float, together: bool
) -> None:
    """Draws the runs, the parabolas and the optima of one budget."""
    ax.set_title(f"{budget(flops)} FLOPs")
    sizes = {r.run_id: quantity_of(r, "parameters", fits.size) for r in records}
    spread = max(sizes.values()) / min(sizes.values())
    markers.log_ticks(ax, (1,) if spread > 300 else (1, 3) if spread > 8 else (1, 2, 5))
    refusals = []
    for arm in fits.arms:
        parabola = fits.parabola(arm, flops, "parameters")
        if parabola is None:
            pass
        elif parabola.refusal is None:
            markers.draw_parabola(ax, fits, parabola)
        else:
            first_clause = re.split("[;:,]", parabola.refusal)[0]
            refusals.append(f"{arm} refused: {first_clause}")
        runs = [
            (r.run_id, sizes[r.run_id], r.eval_loss if r.status == "finished" else None)
            for r in records
            if r.variant == arm
        ]
        markers.draw_runs(ax, fits, arm, runs, together=together)
    ax.margins(x=0.06, y=0.14)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    low, high = ax.get_ylim()
    if len(refusals) > 3:  # no space; the report has their reasons
        refusals = [f"{len(refusals)} arms refused"]
    text = "\n".join(textwrap.fill(refusal, 22) for refusal in refusals)
    ax.annotate(text, (0.5, 0.985), xycoords="axes fraction", ha="center", va="top", fontsize=5.5)
    above = 0.085 * (1 + text.count("\n")) if refusals else 0
    ax.set_ylim(low - 0.1 * (high - low), high + above * (high - low))


def normalised_figure(records: Sequence[RunRecord], fits: Fits) -> Figure:
    """Draws loss against forward FLOPs, both relative to the baseline's optimum."""
    figure = Figure(figsize=(markers.WIDTH, 2.7), layout="constrained")
    ax = figure.subplots()
    together = len(records) > markers.MANY
    shades = {}
    for i, flops in enumerate(fits.budgets):
        best = fits.parabola(fits.baseline, flops, "forward_flops")
        if best is not None and best.refusal is None:
            shades[flops] = 0.3 + 0.7 * (i + 1) / len(fits.budgets)
            here = [r for r in records if r.budget_flops == flops]
            _draw_normalised(ax, here, fits, best, shades[flops], together)
    if not shades:
        text = f"No budget has an accepted optimum of {fits.baseline}\nto compare with."
        ax.set_axis_off()
        ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)
        return figure
    ax.axhline(1, color=markers.INK, linewidth=0.5, zorder=0)
    ax.axvline(1, color=markers.INK, linewidth=0.5, zorder=0)
    markers.log_ticks(ax, (1, 2, 5), lambda x, _: f"{x:g}")
    ax.set_xlabel(f"Forward FLOPs per token, relative to the optimal {fits.baseline} model")
    loss = LOSSES[fits.loss].capitalize()
    ax.set_ylabel(f"{loss},\nrelative to the optimal {fits.baseline} model")
    dot = {"color": markers.INK, "linestyle": "", "marker": "o", "markeredgewidth": 0}
    handles = [
        Line2D([], [], alpha=shade, label=f"{budget(flops)} FLOPs", **dot)
        for flops, shade in shades.items()
    ]
    box = {"frameon": True, "facecolor": markers.SURFACE, "edgecolor": "none", "framealpha": 1}
    ax.legend(handles=handles, loc="upper center", handletextpad=0, **box)
    markers.legend(figure, fits, fits.arms)
    return figure


def _draw_normalised(
    ax: Axes,
    records: Sequence[RunRecord],
    fits: Fits,
    best: Parabola,
    shade: float,
    together: bool,
) -> None:
    """Draws the runs and the parabolas of one budget relative to `best`, the baseline's parabola.

    shade: opacity, from 0 to 1.
    """
    assert best.optimum is not None and best.loss is not None
    for arm in fits.arms:
        colour, _, line = markers.style(fits, arm)
        parabola = fits.parabola(arm, best.budget_flops, "forward_flops")
        if parabola is not None and parabola.refusal is None:
            x, y = markers.trace(parabola)
            look = {"color": colour, "alpha": shade, "linestyle": line, "linewidth": 0.9}
            ax.plot(x / best.optimum, y / best.loss, **look)
        runs = [
            (r.run_id, r.forward_flops_per_token / best.optimum, r.eval_loss / best.loss)
            for r in records
            if r.variant == arm and r.eval_loss is not None
        ]
        markers.draw_runs(ax, fits, arm, runs, shade, together=together)


def curves_figure(curves: Sequence[Curve], fits: Fits) -> Figure | None:
    """Draws smoothed training loss against FLOPs: runs thin, each arm's frontier thick."""
    curves = [curve for curve in curves if len(curve.smooth[0])]
    if not curves:
        return None
    figure = Figure(figsize=(markers.WIDTH, 2.7), layout="constrained")
    ax = figure.subplots()
    by_arm = {arm: [curve for curve in curves if curve.arm == arm] for arm in fits.arms}
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    for arm, found in by_arm.items():
        lines = [(curve.run_id, *curve.smooth) for curve in found]
        markers.draw_curves(ax, fits, arm, lines, together=len(curves) > markers.MANY)
        least = frontier(found)
        if least is not None:
            colour, _, dashes = markers.style(fits, arm)
            ax.plot(*least, color=colour, linestyle=dashes, linewidth=1.5, zorder=3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    highest = max(curve.smooth[1].max() for curve in curves)
    last = {curve.run_id: curve.smooth[1][-1] for curve in curves}
    ends = [loss for run_id, loss in last.items() if run_id not in fits.diverged] or last.values()
    ax.set_ylim(0.97 * min(ends), min(highest, 2 * max(ends)))
    first = min(curve.smooth[0][0] for curve in curves)
    ax.set_xlim(max(first, min(fits.budgets) / 100), 1.1 * max(fits.budgets))
    ticks = MaxNLocator(6).tick_values(*ax.get_ylim())[1:-1]
    ax.yaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(FixedLocator([]))
    ax.set_xlabel("Training FLOPs")
    ax.set_ylabel(f"Training loss (nats per token),\nmean over {SHARE:.0%} of the run's steps")
    markers.legend(figure, fits, list(by_arm), marker=False)
    return figure


def optima_figure(fits: Fits) -> Figure | None:
    """Draws optimal sizes with their power laws, and gaps to the baseline, against the budget."""
    if len(fits.budgets) < 2:
        return None
    figure = Figure(figsize=(markers.WIDTH, 2.3), layout="constrained")
    sizes, gaps = figure.subplots(1, 2)
    ends = (min(fits.budgets) / 1.3, max(fits.budgets) * 1.3)
    _draw_sizes(sizes, fits, np.array(ends))
    _draw_gaps(gaps, fits)
    for ax in (sizes, gaps):
        ax.set_xscale("log")
        ax.set_xlim(*ends)
        ax.xaxis.set_major_locator(FixedLocator(list(fits.budgets)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: budget(x)))
        ax.xaxis.set_minor_locator(FixedLocator([]))
        ax.set_xlabel("Budget (training FLOPs)")
    markers.legend(figure, fits, fits.arms)
    return figure


def _draw_sizes(ax: Axes, fits: Fits, spread: np.ndarray) -> None:
    """Draws every optimal size with its interval, and the power laws over `spread`, in FLOPs."""
    for law in fits.laws:
        if law.quantity == "parameters" and law.coefficient is not None:
            colour, _, line = markers.style(fits, law.arm)
            ax.plot(spread, law.coefficient * spread**law.exponent, color=colour, linestyle=line)
    optima = []
    for p in fits.parabolas:
        if p.quantity == "parameters" and p.optimum is not None:
            optima.append(p.optimum)
            markers.draw_interval(ax, fits, p.arm, p.budget_flops, p.optimum, p.optimum_interval)
    if optima:
        ax.set_yscale("log")
        ax.set_ylim(min(optima) / 2, max(optima) * 2)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count(y)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel(f"Optimal\n{KINDS['parameters', fits.size]}")


def _draw_gaps(ax: Axes, fits: Fits) -> None:
    """Draws every gap with its interval, in percent of the baseline's loss."""
    ax.axhline(0, color=markers.style(fits, fits.baseline)[0], linewidth=1.1)
    others = [arm for arm in fits.arms if arm != fits.baseline]
    for gap in fits.gaps:
        if gap.percent is not None:
            shift = 1.06 ** (others.index(gap.arm) - (len(others) - 1) / 2)
            x = gap.budget_flops * shift
            markers.draw_interval(ax, fits, gap.arm, x, gap.percent, gap.percent_interval)
    ax.set_ylabel(f"Loss at the optimum\nagainst {fits.baseline}'s (%)")
    ax.margins(y=0.15)
