"""Comparisons of arms as Markdown tables."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from experiments.compare import (
    Interval,
    Optima,
    Texts,
    best,
    causal,
    cells,
    difference,
    loss,
    mean_rates,
)
from modjax.records import RunRecord
from modjax.scaling.formatting import budget as flops


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def cell(found: Interval) -> str:
    """Formats a difference, in bold if it is significant."""
    return f"**{found}**" if found.significant else str(found)


def rate_table(records: Iterable[RunRecord]) -> str:
    """Returns the mean loss of every arm at each coefficient of the rate, the lowest in bold."""
    found = mean_rates(records)

    def show(mean: float, means: Iterable[float]) -> str:
        return f"**{mean:.3f}**" if mean == min(means) else f"{mean:.3f}"

    coefficients = sorted({x for by_rate in found.values() for x in by_rate})
    rows = ([f"{x}", *(show(by[x], by.values()) for by in found.values())] for x in coefficients)
    return markdown(("coefficient", *found), rows)


def best_table(trained: list[RunRecord], more: Mapping[str, Callable[[RunRecord], str]]) -> str:
    """Returns the best size of each arm at each budget.

    `more` maps the title of a further column to a function from a run to its text.
    """
    before = {r.run_id: r for r in trained}

    def rows() -> Iterator[list[str]]:
        for budget, by_arm in cells(causal(trained)).items():
            dense = loss(best(by_arm["dense"]))
            for arm, sizes in sorted(by_arm.items(), key=lambda item: loss(best(item[1]))):
                runs = best(sizes)
                seeds = ", ".join(f"{r.eval_loss:.4f}" for r in runs)
                against = f"{100 * (loss(runs) / dense - 1):+.2f}%"
                as_trained = f"{loss([before[r.run_id] for r in runs]):.4f}"
                others = (show(runs[0]) for show in more.values())
                yield [
                    flops(budget),
                    arm,
                    f"{runs[0].d_model}",
                    seeds,
                    against,
                    as_trained,
                    *others,
                ]

    columns = ("budget", "arm", "width", "loss of each seed", "against dense", "as trained")
    return markdown((*columns, *more), rows())


def pair_table(texts: Texts, pairs: Sequence[str]) -> str:
    """Returns differences at equal width and seed.

    "by width" gives the difference at the smallest and the largest width if it depends on it.
    """
    budgets = list(cells(next(iter(texts.values()))))

    def rows() -> Iterator[list[str]]:
        for budget in budgets:
            for arms in pairs:
                found = [difference(records, arms, budget) for records in texts.values()]
                low, high = min(d.ratio[0] for d in found), max(d.ratio[1] for d in found)
                row = [flops(budget), arms, f"{low:.2f} to {high:.2f}"]
                for d in found:
                    ends = (f"{d.widths[w]:+.3f} at {w}" for w in (min(d.widths), max(d.widths)))
                    row += [cell(d), ", ".join(ends) if d.varies else ""]
                yield row

    columns = (column for text in texts for column in (text, "by width"))
    return markdown(("budget", "arms", "FLOPs", *columns), rows())


def optimum_table(texts: Mapping[str, Optima]) -> str:
    """Returns differences at the arms' own optima, with the ratio of their FLOPs per token."""
    first, *_ = texts.values()

    def rows() -> Iterator[list[str]]:
        for (budget, arms), _ in sorted(first.items(), key=lambda item: (item[0][0], item[1].mean)):
            found = [optima[budget, arms] for optima in texts.values()]
            yield [flops(budget), arms, *(x for d in found for x in (cell(d), f"{d.ratio:.2f}"))]

    columns = (column for text in texts for column in (text, "FLOPs"))
    return markdown(("budget", "arms", *columns), rows())
