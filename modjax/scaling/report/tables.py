"""The tables of fits and of runs in a report."""

from collections.abc import Sequence

from modjax.records import RunRecord, causal_loss
from modjax.scaling.fit.results import Fits, as_compared
from modjax.scaling.formatting import budget
from modjax.scaling.report import prose as words
from modjax.scaling.report.comparison import no_causal_sentence
from modjax.scaling.report.differences import Specs
from modjax.scaling.report.html import bullets, table

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


def gap_table(fits: Fits) -> list[str]:
    """Every arm against the baseline, each at its own optimum; [] where there is none."""
    if not fits.gaps:
        return []
    show = words.fixed(4, "+"), words.fixed(2, "+"), words.fixed(2)
    rows = [
        (g.arm, budget(g.budget_flops), "refused", *[""] * 5)
        if g.loss is None or g.percent is None
        else (
            g.arm,
            budget(g.budget_flops),
            show[0](g.loss),
            words.span(g.loss_interval, show[0]),
            show[1](g.percent),
            words.span(g.percent_interval, show[1]),
            "" if g.flops_ratio is None else show[2](g.flops_ratio),
            words.span(g.flops_ratio_interval, show[2]),
        )
        for g in fits.gaps
    ]
    header = (
        f"against {fits.baseline}",
        "budget",
        "loss gap",
        "95% interval",
        "%",
        "95% interval",
        "FLOPs ratio",
        "95% interval",
    )
    return [table(header, rows)]


def law_table(fits: Fits) -> list[str]:
    """The power laws that were fitted."""
    rows = [
        (
            law.arm,
            law.quantity.replace("_", " "),
            f"{law.coefficient:.3g}",
            f"{law.exponent:.4f}",
            words.span(law.exponent_interval, words.fixed(4)),
            str(law.points),
        )
        for law in fits.laws
        if law.coefficient is not None and law.exponent is not None
    ]
    header = ("arm", "at the optimum", "coefficient", "exponent of C", "95% interval", "optima")
    return [table(header, rows)] if rows else []


def repeat_table(fits: Fits) -> list[str]:
    """Returns the losses of cells with several seeds."""
    if not fits.repeats:
        return []
    return ["<h3>Seeds</h3>", table(words.REPEAT_HEADER, words.repeat_rows(fits.repeats))]


def no_causal_table(fits: Fits) -> list[str]:
    """Returns the section of runs that have no causal loss; [] where there are none."""
    if not fits.no_causal_loss:
        return []
    said = bullets(no_causal_sentence(one, fits.loss) for one in fits.no_causal_loss)
    if fits.loss == "trained":
        return ["<h2>Compared as trained alone</h2>", said]
    rows = words.as_trained_rows(fits.no_causal_loss)
    return ["<h2>Not compared</h2>", said, table(words.AS_TRAINED_HEADER, rows)]


def run_table(records: Sequence[RunRecord], fits: Fits, specs: Specs, marked: bool) -> str:
    """Returns the table of all runs, with both of their losses.

    Status and bits per byte are those under the loss that arms are compared by. Columns follow for
    what the layers report of an evaluation, and for the fields of a run's spec that no other table
    has.
    """
    outcomes = sorted({name for r in records for name in r.outcome})
    more = [name for name in specs.run_fields if name not in SPEC_COLUMNS]

    def cells(r: RunRecord) -> list[object]:
        losses = {"causal_loss": causal_loss(r), "eval_loss": r.eval_loss}
        compared = as_compared(r, fits.loss)
        shown = [losses.get(f, getattr(compared, f)) for f in RUN_COLUMNS.values()]
        shown += [r.outcome.get(name) for name in outcomes]
        return [*shown, *(specs.by_run.get(r.run_id, {}).get(name) for name in more)]

    rows = [f"run:{r.run_id}" for r in records] if marked else None
    return table([*RUN_COLUMNS, *outcomes, *more], map(cells, records), rows)
