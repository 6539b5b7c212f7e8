"""Marks of arms, runs, parabolas and optima, drawn alike in all figures.

An arm keeps one colour (Okabe and Ito's palette), one marker and one line style in all figures.
With more arms than colours, a colour recurs with another marker and line style.
Every mark of a run has the SVG id `run:<run_id>`, and every optimum `optimum:<arm>:<budget>`; the
report turns these ids into tooltips. More than MANY runs are too dense to point at, so they are
drawn together and have no ids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from modjax.scaling.fit.results import Fits, Parabola, Range
from modjax.scaling.formatting import count
from modjax.scaling.report.prose import mark, open_ends

INK, FAINT, SURFACE = "#1a1a1a", "#d4d4d4", "#fefefe"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "<")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2)))
WIDTH = 10 / 2.54  # inches
MANY = 1000
RC: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "legend.fontsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "legend.handlelength": 2.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "savefig.dpi": 300,
    "svg.fonttype": "path",
    "axes.formatter.useoffset": False,
}
EDGE = {"markeredgecolor": SURFACE, "markeredgewidth": 0.35}


def style(fits: Fits, arm: str) -> tuple[str, str, Any]:
    """Returns the arm's colour, marker and line style."""
    return nth_style(fits.arms.index(arm))


def nth_style(place: int) -> tuple[str, str, Any]:
    """Returns the colour, marker and line style of arm number `place`, from 0."""
    turn, i = divmod(place, len(COLOURS))
    return COLOURS[i], MARKERS[(i + turn) % len(MARKERS)], LINES[(i - turn) % len(LINES)]


def trace(parabola: Parabola) -> tuple[np.ndarray, np.ndarray]:
    """Returns points (x, loss) of an accepted parabola over the sampled range."""
    assert parabola.low is not None and parabola.high is not None
    x = np.geomspace(parabola.low, parabola.high, 100)
    return x, parabola.at(x)


def draw_parabola(ax: Axes, fits: Fits, p: Parabola) -> None:
    """Draws a parabola over the sampled range and its vertex.

    A thin line drops from the vertex to its interval at the bottom of the axes.
    """
    assert p.optimum is not None and p.loss is not None and p.optimum_interval is not None
    colour, marker, line = style(fits, p.arm)
    x, y = trace(p)
    ax.plot(x, y, color=colour, linestyle=line)
    height = 0.02 + 0.028 * fits.arms.index(p.arm)
    bottom = ax.get_xaxis_transform()
    ax.plot(
        np.clip(p.optimum_interval, x[0], x[-1]),
        [height, height],
        color=colour,
        linestyle=":" if all(open_ends(p.optimum_interval)) else "-",
        transform=bottom,
        linewidth=1.6,
        solid_capstyle="butt",
    )
    drop = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 3.2, "shrinkB": 0}
    foot, vertex = (p.optimum, height), (p.optimum, p.loss)
    ax.annotate("", foot, vertex, xycoords=bottom, textcoords="data", arrowprops=drop)
    hollow = {"markersize": 6.5, "markerfacecolor": "none", "markeredgewidth": 0.9, "zorder": 4}
    (drawn,) = ax.plot(*vertex, marker=marker, color=colour, linestyle="", **hollow)
    drawn.set_gid(f"optimum:{p.arm}:{p.budget_flops}")


def draw_runs(
    ax: Axes,
    fits: Fits,
    arm: str,
    runs: Sequence[tuple[str, float, float | None]],
    strength: float = 1.0,
    *,
    together: bool = False,
) -> None:
    """Draws an arm's runs (run_id, x, y). A diverged run has y None: a cross at the top edge.

    strength: opacity, from 0 to 1.
    together: whether to rasterise all runs as one artist, without ids.
    """
    colour, marker, _ = style(fits, arm)
    cross = {"marker": "x", "markersize": 4, "zorder": 3, "transform": ax.get_xaxis_transform()}
    point = {"marker": marker, "alpha": strength, "zorder": 5, **EDGE}
    crosses = [(run_id, x, 0.97) for run_id, x, y in runs if y is None]
    points = [(run_id, x, y) for run_id, x, y in runs if y is not None]
    for look, marked in ((cross, crosses), (point, points)):
        for group in _groups(marked, together):
            names, x, y = zip(*group, strict=True)
            (drawn,) = ax.plot(x, y, color=colour, linestyle="", rasterized=together, **look)
            drawn.set_gid(None if together else f"run:{names[0]}")


def draw_curves(
    ax: Axes,
    fits: Fits,
    arm: str,
    runs: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    together: bool = False,
) -> None:
    """Draws an arm's learning curves (run_id, x, y) as thin lines.

    together: whether to rasterise all curves as one artist, without ids.
    """
    for group in _groups(runs, together):
        lines = [np.stack([x, y], -1) for _, x, y in group]
        if together:  # matplotlib transforms line by line, and a NaN begins another
            gap = np.full((1, 2), np.nan)
            ended = [part for line in lines for part in (line, gap)]
            lines = [np.concatenate(ended[i : i + 100]) for i in range(0, len(ended), 100)]
        drawn = LineCollection(
            lines, color=style(fits, arm)[0], alpha=0.5, linewidth=0.45, rasterized=together
        )
        drawn.set_gid(None if together else f"run:{group[0][0]}")
        ax.add_collection(drawn)


def _groups(runs: Sequence[Any], together: bool) -> list[Sequence[Any]]:
    """Returns the runs that each artist draws: all runs if `together`, or else one run each."""
    if together:
        return [runs] if runs else []
    return [[run] for run in runs]


def draw_interval(ax: Axes, fits: Fits, arm: str, x: float, y: float, ends: Range | None) -> None:
    """Draws an arm's value with its interval. An open or unknown one is dotted over full height."""
    colour, marker, _ = style(fits, arm)
    if ends is not None and not any(open_ends(ends)):
        ax.plot([x, x], ends, color=colour, linewidth=0.9)
    else:
        ax.axvline(x, color=colour, linewidth=0.7, linestyle=":")
    ax.plot(x, y, marker=marker, color=colour, markersize=4.2, linestyle="", **EDGE)


def log_ticks(ax: Axes, subs: tuple[int, ...], show: Any = lambda x, _: count(x)) -> None:
    """Sets a log x axis with plain labels at `subs` times the powers of ten."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(show))
    ax.xaxis.set_minor_formatter(NullFormatter())


def legend(
    figure: Figure, fits: Fits, arms: Sequence[str], marker: bool = True, diverged: bool = False
) -> None:
    """Draws one legend above the axes: the arms, and the cross of a diverged run."""
    handles = []
    for arm in arms:
        colour, shape, line = style(fits, arm)
        look = {"color": colour, "linestyle": line, "marker": shape if marker else ""}
        handles.append(Line2D([], [], label=mark(fits, arm), **look))
    if diverged:
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="", label="diverged"))
    columns = min(4, len(handles))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.6)
