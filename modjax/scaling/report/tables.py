"""The tables of fits and of runs, for the terminal and the page."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from modjax.records import RunRecord, causal_loss
from modjax.scaling.fit.comparable_runs import with_loss
from modjax.scaling.fit.results import Fits, NoCausalLoss, SeedSpread
from modjax.scaling.formatting import budget, count
from modjax.scaling.report.prose import fixed, span
from modjax.scaling.report.spec_differences import Specs

# Columns of the table of runs -> the field of a record.
RUN_COLUMNS = {
    "run": "run_id",
    "arm": "variant",
    "status": "status",
    "budget": "budget_flops",
    "N": "params_non_embedding",
    "causal loss": "causal_loss",
    "trained loss": "eval_loss",
    "± sem": "eval_loss_sem",
    "bits/byte": "eval_bits_per_byte",
    "FLOPs/token": "forward_flops_per_token",
    "tokens": "tokens",
    "epochs": "epochs",
    "steps": "steps",
    "width": "d_model",
    "layers": "num_layers",
    "total": "params_total",
    "active": "params_active",
    "learning rate": "learning_rate",
    "seed": "seed",
    "FLOPs spent": "train_flops",
    "seconds": "wall_seconds",
    "s/step": "median_step_seconds",
}
# Fields of a spec that RUN_COLUMNS shows.
SPEC_COLUMNS = (
    "variant",
    "budget_flops",
    "model.d_model",
    "model.num_layers",
    "train.steps",
    "train.learning_rate",
    "train.seed",
)
INTERVAL = "95% interval"


class Table(NamedTuple):
    """A table. Every row has one cell per column of the header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


def optimum_table(fits: Fits) -> Table:
    """Returns one row per arm and budget; a refused fit says so in place of its optimum."""
    rows = []
    for p in fits.parabolas:
        if p.quantity != "parameters":
            continue
        start = (p.arm, budget(p.budget_flops), str(p.sizes))
        if p.optimum is None or p.loss is None or p.off_centre is None:
            rows.append((*start, "refused", *[""] * 5))
            continue
        ends = span(p.optimum_interval, count), span(p.loss_interval, fixed(4))
        by_flops = fits.parabola(p.arm, p.budget_flops, "forward_flops")
        flops = count(by_flops.optimum) if by_flops and by_flops.optimum else "refused"
        found = (count(p.optimum), ends[0], f"{p.loss:.4f}", ends[1], f"{p.off_centre:+.2f}", flops)
        rows.append((*start, *found))
    header = ("arm", "budget", "sizes", "optimum N", INTERVAL, "loss", INTERVAL, "off-centre")
    return Table((*header, "FLOPs/token"), rows)


def gap_table(fits: Fits) -> Table:
    """Returns one row per arm and budget, against the baseline, each at its own optimum."""
    nats, percent, times = fixed(4, "+"), fixed(2, "+"), fixed(2)
    rows = []
    for g in fits.gaps:
        start = (g.arm, budget(g.budget_flops))
        if g.loss is None or g.percent is None:
            rows.append((*start, "refused", *[""] * 5))
            continue
        loss = nats(g.loss), span(g.loss_interval, nats)
        relative = percent(g.percent), span(g.percent_interval, percent)
        ratio = "" if g.flops_ratio is None else times(g.flops_ratio)
        rows.append((*start, *loss, *relative, ratio, span(g.flops_ratio_interval, times)))
    header = (f"against {fits.baseline}", "budget", "loss gap", INTERVAL, "%", INTERVAL)
    return Table((*header, "FLOPs ratio", INTERVAL), rows)


def law_table(fits: Fits) -> Table:
    """Returns one row per power law that was not refused."""
    rows = [
        (
            law.arm,
            law.quantity.replace("_", " "),
            f"{law.coefficient:.3g}",
            f"{law.exponent:.4f}",
            span(law.exponent_interval, fixed(4)),
            str(law.points),
        )
        for law in fits.laws
        if law.refusal is None
    ]
    header = ("arm", "at the optimum", "coefficient", "exponent of C", INTERVAL, "optima")
    return Table(header, rows)


def seed_table(cells: Iterable[SeedSpread]) -> Table:
    """Returns one row per cell, with the spread of its seeds."""
    header = ("arm", "budget", "width", "N", "seeds", "mean loss", "std of a seed")
    rows = []
    for cell in cells:
        model = (cell.arm, budget(cell.budget_flops), str(cell.d_model), count(cell.params))
        deviation = "" if cell.deviation is None else f"{cell.deviation:.4f}"
        rows.append((*model, str(cell.seeds), f"{cell.loss:.4f}", deviation))
    return Table(header, rows)


def as_trained_table(found: Sequence[NoCausalLoss]) -> Table:
    """Returns one row per cell without a causal loss, with its loss as trained last."""
    header, rows = seed_table(cell for one in found for cell in one.as_trained)
    rows = [(*start, deviation, loss) for *start, loss, deviation in rows]
    return Table((*header[:-2], "std of a seed", "loss as trained"), rows)


def run_table(records: Sequence[RunRecord], fits: Fits, specs: Specs) -> Table:
    """Returns the table of all runs, with both of their losses.

    Status and bits per byte belong to the loss that arms are compared by. The last columns are the
    metrics that layers report in the evaluation, and the spec fields that are in no other table.
    """
    outcomes = sorted({name for r in records for name in r.outcome})
    more = [name for name in specs.run_fields if name not in SPEC_COLUMNS]

    def cells(r: RunRecord) -> list[object]:
        losses = {"causal_loss": causal_loss(r), "eval_loss": r.eval_loss}
        compared = with_loss(r, fits.loss)
        shown = [losses.get(f, getattr(compared, f)) for f in RUN_COLUMNS.values()]
        shown += [r.outcome.get(name) for name in outcomes]
        return [*shown, *(specs.by_run.get(r.run_id, {}).get(name) for name in more)]

    return Table([*RUN_COLUMNS, *outcomes, *more], [cells(r) for r in records])
