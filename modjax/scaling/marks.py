"""How arms, runs, parabolas and optima are marked, alike in all figures.

An arm keeps one colour (Okabe and Ito's palette), one marker and one line style in all figures;
where there are more arms than colours, the same colour comes again with another of each.
Every mark of a run carries the SVG id `run:<run_id>`, and every optimum `optimum:<arm>:<budget>`,
which the report turns into tooltips.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from modjax.records import Record
from modjax.scaling.numbers import count
from modjax.scaling.results import Fits, Parabola, Range

INK, FAINT, SURFACE = "#1a1a1a", "#d4d4d4", "#fefefe"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "<")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)))
WIDTH = 10 / 2.54  # inches
RC: dict[Any, Any] = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "legend.fontsize": 7,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5,
    "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 1.1, "lines.markersize": 3.6, "legend.handlelength": 2.6,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "figure.facecolor": SURFACE, "axes.facecolor": SURFACE,
    "savefig.dpi": 300, "svg.fonttype": "path", "axes.formatter.useoffset": False,
}  # fmt: skip


def style(fits: Fits, arm: str) -> tuple[str, str, Any]:
    """The arm's colour, marker and line style."""
    turn, i = divmod(fits.arms.index(arm), len(COLOURS))
    return COLOURS[i], MARKERS[(i + turn) % len(MARKERS)], LINES[(i - turn) % len(LINES)]


def trace(parabola: Parabola) -> tuple[np.ndarray, np.ndarray]:
    """Points (x, loss) of an accepted parabola over the sampled range."""
    assert parabola.low is not None and parabola.high is not None
    x = np.geomspace(parabola.low, parabola.high, 100)
    return x, parabola.at(x)


def draw_parabola(ax: Axes, fits: Fits, p: Parabola) -> None:
    """The parabola over the sampled range; its vertex, dropped to the vertex's interval below."""
    assert p.optimum is not None and p.loss is not None and p.optimum_interval is not None
    colour, marker, line = style(fits, p.arm)
    x, y = trace(p)
    ax.plot(x, y, color=colour, linestyle=line)
    height = 0.02 + 0.028 * fits.arms.index(p.arm)
    ax.plot(np.clip(p.optimum_interval, x[0], x[-1]), [height, height], color=colour,
            transform=ax.get_xaxis_transform(), linewidth=1.6, solid_capstyle="butt")  # fmt: skip
    ax.annotate(
        "",
        (p.optimum, height),
        (p.optimum, p.loss),
        xycoords=ax.get_xaxis_transform(),
        textcoords="data",
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.5,
            "shrinkA": 3.2,
            "shrinkB": 0,
        },
    )
    (mark,) = ax.plot(
        [p.optimum],
        [p.loss],
        marker=marker,
        markersize=6.5,
        color=colour,
        markerfacecolor="none",
        markeredgewidth=0.9,
        linestyle="",
        zorder=4,
    )
    mark.set_gid(f"optimum:{p.arm}:{p.budget_flops}")


def draw_run(
    ax: Axes, fits: Fits, run: Record, x: float, y: float | None, strength: float = 1.0
) -> None:
    """One run; a diverged one as a cross on the upper edge."""
    colour, marker, _ = style(fits, run.variant)
    if y is None:
        (mark,) = ax.plot([x], [0.97], marker="x", color=colour, markersize=4, linestyle="",
                          transform=ax.get_xaxis_transform(), zorder=3)  # fmt: skip
    else:
        (mark,) = ax.plot([x], [y], marker=marker, color=colour, alpha=strength, linestyle="",
                          markeredgecolor=SURFACE, markeredgewidth=0.35, zorder=5)  # fmt: skip
    mark.set_gid(f"run:{run.run_id}")


def draw_point(ax: Axes, fits: Fits, arm: str, x: float, y: float, ends: Range | None) -> None:
    """An arm's value with its interval; an unbounded interval is a dotted line across."""
    colour, marker, _ = style(fits, arm)
    if ends is not None and all(math.isfinite(end) for end in ends):
        ax.plot([x, x], ends, color=colour, linewidth=0.9)
    else:
        ax.axvline(x, color=colour, linewidth=0.7, linestyle=":")
    ax.plot([x], [y], marker=marker, color=colour, markersize=4.2, markeredgecolor=SURFACE,
            markeredgewidth=0.35, linestyle="")  # fmt: skip


def log_ticks(ax: Axes, subs: tuple[int, ...], show: Any = lambda x, _: count(x)) -> None:
    """A log abscissa with plain labels at `subs` times the powers of ten."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(show))
    ax.xaxis.set_minor_formatter(NullFormatter())


def legend(
    figure: Figure, fits: Fits, arms: Sequence[str], marker: bool = True, diverged: bool = False
) -> None:
    """One legend above the axes: the arms, and what a diverged run looks like."""
    handles = []
    for arm in arms:
        colour, shape, line = style(fits, arm)
        handles.append(Line2D([], [], color=colour, linestyle=line, label=arm,
                              marker=shape if marker else ""))  # fmt: skip
    if diverged:
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="", label="diverged"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)),
                  columnspacing=1.6)  # fmt: skip
