"""Figure 3: every routing scheme at one budget, and learning curves of four models.

Usage: python experiments/fig3_variants/plot.py WORKDIR NAME   (of a configs/fig3_variants sweep)
Writes NAME.png and NAME.csv beside this file, and prints the table of README.md.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from modjax.records import Record, read_records, write_csv
from modjax.scaling.curves import read_curves
from modjax.scaling.marks import COLOURS, RC, nth_style
from modjax.scaling.observed import Repeated, by_cell

HERE = Path(__file__).parent
# So much worse at every size that it would flatten all the others.
OFF_SCALE = "mod12-every"


def cells(records: list[Record]) -> dict[str, list[Repeated]]:
    """Those of every arm, by size; the sweep has one budget."""
    return {arm: found for (arm, _), found in by_cell(records).items()}


def loss(runs: Repeated) -> float:
    return statistics.mean(r.eval_loss for r in runs if r.eval_loss is not None)


def draw(workdir: Path, records: list[Record], path: Path) -> None:
    by_arm = cells(records)
    curves = {curve.run_id: curve for curve in read_curves(workdir, records)}
    with plt.rc_context(RC):
        figure, (left, right) = plt.subplots(1, 2, figsize=(18 / 2.54, 8 / 2.54))
        for i, (arm, sizes) in enumerate(by_arm.items()):
            colour, marker, line = nth_style(i)
            x = [runs[0].params_non_embedding for runs in sizes]
            left.plot(x, list(map(loss, sizes)), color=colour, marker=marker, linestyle=line,
                      label=arm)  # fmt: skip
        shown = [loss(runs) for arm, sizes in by_arm.items() if arm != OFF_SCALE for runs in sizes]
        low, room = min(shown), 0.07 * (max(shown) - min(shown))
        left.set(xscale="log", xlabel="non-embedding parameters",
                 ylim=(low - room, max(shown) + room),
                 ylabel="validation loss, nats per byte")  # fmt: skip
        off = list(map(loss, by_arm[OFF_SCALE]))
        left.text(0.02, 0.02, f"{OFF_SCALE}: {min(off):.2f} to {max(off):.2f}",
                  transform=left.transAxes, color="#777777", fontsize=5.5)  # fmt: skip
        left.xaxis.set_minor_formatter(NullFormatter())
        left.legend(ncols=3, fontsize=5.5, loc="lower center", bbox_to_anchor=(0.5, 1))
        for record, colour in zip(four(by_arm), COLOURS, strict=False):
            label = f"{record.variant} {record.params_non_embedding / 1e3:.0f}k"
            right.plot(*curves[record.run_id].smooth, color=colour, label=label)
        right.set(xscale="log", xlim=(1e10, 4e11), ylim=(low - 0.05, low + 0.8),
                  xlabel="training FLOPs", ylabel="training loss")  # fmt: skip
        right.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=200)


def four(by_arm: dict[str, list[Repeated]]) -> list[Record]:
    """The optimal baseline, and three MoD models: its size, the optimal one, and a larger one."""
    mod, (best, *_) = by_arm["mod12"], min(by_arm["dense"], key=loss)
    nearest = min(mod, key=lambda of: abs(of[0].params_non_embedding - best.params_non_embedding))
    return [best, *(runs[0] for runs in mod if runs in (nearest, min(mod, key=loss), mod[-1]))]


def table(records: list[Record]) -> None:
    best = {arm: min(sizes, key=loss) for arm, sizes in cells(records).items()}
    print("| arm | best size (d, N) | loss of each seed | against dense | causal loss |")
    print("|---|---|---|---|---|")
    for arm, runs in sorted(best.items(), key=lambda item: loss(item[1])):
        causal = [r.causal_loss for r in runs if r.causal_loss is not None]
        print(
            f"| {arm} | {runs[0].d_model}, {runs[0].params_non_embedding / 1e3:.0f}k | "
            f"{', '.join(f'{r.eval_loss:.4f}' for r in runs)} | "
            f"{100 * (loss(runs) / loss(best['dense']) - 1):+.1f}% | "
            f"{f'{statistics.mean(causal):.4f} ({runs[0].causal_routing})' if causal else ''} |"
        )


def paired(records: list[Record]) -> None:
    """Every scheme against learned routing of its capacity, over runs of equal width and seed."""
    losses = {(r.variant, r.d_model, r.seed): r.eval_loss for r in records}
    for arm in dict.fromkeys(r.variant for r in records):
        learned = "mod50" if arm.endswith("50") else "mod12"
        pairs = [
            loss - losses[learned, width, seed]
            for (name, width, seed), loss in losses.items()
            if name == arm and (learned, width, seed) in losses
        ]
        if arm not in ("dense", learned, OFF_SCALE):
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            print(f"{arm} - {learned}: {statistics.mean(pairs):+.4f} +- {error:.4f}, {len(pairs)}")


if __name__ == "__main__":
    workdir, name = Path(sys.argv[1]), sys.argv[2]
    records = read_records(workdir)
    write_csv(HERE / f"{name}.csv", records)
    table(records)
    paired(records)
    draw(workdir, records, HERE / f"{name}.png")
