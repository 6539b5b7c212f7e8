"""Loss against measured time: what each way to skip costs, and what it saves.

Usage: python -m experiments.router_tuning.plot
Reads the scores and times in results/ and draws cells.png.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.router_tuning.record import RESULTS, change, read, times
from modjax.scaling.report.markers import RC, nth_style

INNERS, UNITS = ("attention", "mlp", "block"), {"token": "o", "sequence": "s"}


def main() -> None:
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(16 / 2.54, 11 / 2.54), layout="constrained")
        for name, ratio in times().items():
            cell, _, control = name.partition(", ")
            found = read(cell, control or "tuned")
            if found is None:
                continue
            inner, unit, *rest = cell.split("-")
            colour, _, _ = nth_style(INNERS.index(inner))
            loss = change(found)
            spread = [[loss["value"] - loss["low"]], [loss["high"] - loss["value"]]]
            style = {"color": colour, "marker": "x" if control else UNITS[unit], "capsize": 2}
            ax.errorbar(ratio, loss["value"], yerr=spread, **style)
            said = " ".join([*rest, control]).strip()
            ax.annotate(
                said, (ratio, loss["value"]), (4, 3), textcoords="offset points", fontsize=6
            )
        for i, inner in enumerate(INNERS):
            ax.plot([], [], color=nth_style(i)[0], label=inner)
        for unit, marker in (*UNITS.items(), ("whole layers dropped", "x")):
            ax.plot([], [], color="grey", linestyle="", marker=marker, label=unit)
        ax.axhline(0.02, color="black", linewidth=0.8, linestyle="--", label="margin")
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_yscale("log")
        ax.set(
            xlabel="time of a prefill of 2,048 tokens / that of the base",
            ylabel="loss above the base, nats per token",
        )
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
        figure.savefig(RESULTS.parent / "cells.png", dpi=200)


if __name__ == "__main__":
    main()
