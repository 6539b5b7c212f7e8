"""Plain-text tables for the command line."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modjax.data.manifest import Manifest
from modjax.flops import (
    CONVENTIONS,
    cache_bytes,
    forward_flops,
    parameters,
    six_nd,
    total_flops,
    train_flops,
)
from modjax.records import RunRecord, causal_loss
from modjax.scaling.formatting import clock, count
from modjax.scaling.plan.plan_table import PlannedRun
from modjax.scaling.report.prose import span
from modjax.scaling.report.terminal import text_table
from modjax.scaling.status import STATES, Status
from modjax.scaling.sweep import Outcome
from modjax.specs import RunSpec

if TYPE_CHECKING:
    from modjax.checks.look_ahead import Finding

LOSS_COLUMNS = ("causal loss", "as trained")


def data_text(manifests: Sequence[Manifest]) -> str:
    header = ("corpus", "vocab", "ids", "split", "documents", "tokens", "bytes")
    rows = [
        (
            m.name,
            m.vocab,
            str(m.vocab_size),
            name,
            count(split.documents),
            count(split.tokens),
            count(split.bytes),
        )
        for m in manifests
        for name, split in m.splits.items()
    ]
    return text_table(header, rows)


def plan_text(cells: Sequence[PlannedRun], jobs: int) -> str:
    header = (
        "arm",
        "budget",
        "width",
        "layers",
        "total",
        "non-emb",
        "active",
        "stream",
        "tokens",
        "tok/par",
        "steps",
        "batch",
        "lr",
        "epochs",
        "FLOPs",
        "achieved",
        "time",
        "flags",
    )
    rows = [
        (
            c.arm,
            f"{c.budget_flops:.3g}",
            str(c.d_model),
            str(c.num_layers),
            count(c.params_total),
            count(c.params_non_embedding),
            count(c.params_active),
            f"{count(c.stream_bytes)}B",
            count(c.tokens),
            f"{c.tokens_per_param:.3g}",
            str(c.steps),
            str(c.batch_size),
            f"{c.learning_rate:.2e}",
            "?" if c.epochs is None else f"{c.epochs:.2f}",
            f"{c.train_flops:.3g}",
            f"{c.achieved:.2%}",
            clock(c.seconds),
            ", ".join(c.flags) or "-",
        )
        for c in cells
    ]
    flops, seconds = sum(c.train_flops for c in cells), sum(c.seconds for c in cells)
    flagged = sum(bool(c.flags) for c in cells)
    return (
        f"{text_table(header, rows)}\n\n{_prediction_text(cells)}{len(cells)} runs, {flops:.3g} "
        f"training FLOPs, about {clock(seconds / jobs)} on {jobs} worker{'s' * (jobs > 1)}; "
        f"{flagged} flagged"
    )


def _prediction_text(cells: Sequence[PlannedRun]) -> str:
    """What the fit can tell, by budget and arm; empty where one size seeks no optimum."""
    predictions = {(c.budget_flops, c.arm): c.prediction for c in cells if c.prediction.sizes > 1}
    if not predictions:
        return ""
    rows = [
        (
            f"{budget:.3g}",
            arm,
            f"{f.sizes}, {count(f.low)} to {count(f.high)}",
            str(f.freedom),
            span(f.optimum_interval, count) if f.optimum_interval else "refused",
            span(f.exponent_interval, "{:.2f}".format) if f.exponent_interval else "-",
        )
        for (budget, arm), f in predictions.items()
    ]
    header = ("budget", "arm", "sizes", "freedom", "optimal N", "exponent of N")
    return (
        "What `modjax fit` can be expected to tell (95% intervals), where a run's loss has a noise "
        f"of {cells[0].prediction.noise:g} nats (--noise) with so many degrees of freedom:\n"
        f"{text_table(header, rows)}\n\n"
    )


def claims_text(findings: "Sequence[Finding]") -> str:
    """Returns what each layer claims of looking ahead and what was seen, by routing."""
    rows = [
        (
            f.layer,
            f.routing,
            "never looks ahead" if f.claims else "may look ahead",
            "nothing moves before an edit" if f.leak is None else str(f.leak),
        )
        for f in findings
    ]
    return text_table(("layer", "routing", "claims", "seen"), rows, left=4)


def status_text(status: Status) -> str:
    rows = [
        (
            run.run_id,
            run.state,
            f"{run.step}/{run.steps}",
            count(run.params_total) if run.params_total else "",
            count(run.params_active) if run.params_active else "",
            *_losses(run.causal_loss, run.eval_loss),
            run.why,
        )
        for run in status.runs
    ]
    counts = ", ".join(f"{status.count(state)} {state}" for state in STATES)
    header = ("run", "state", "step", "total", "active", *LOSS_COLUMNS, "")
    return f"{text_table(header, rows)}\n\n{counts}; about {clock(status.remaining_seconds)} left"


def _losses(causal: float | None, trained: float | None) -> tuple[str, str]:
    """Returns the cells of LOSS_COLUMNS, empty for a run that has not finished."""
    if trained is None:
        return "", ""
    return "none" if causal is None else f"{causal:.4f}", f"{trained:.4f}"


def outcome_text(outcome: Outcome) -> str:
    rows = [_result(record) for record in outcome.records]
    rows += [(run_id, "failed", *[""] * 6) for run_id in outcome.failures]
    header = ("run", "state", "non-emb", "tokens", *LOSS_COLUMNS, "+-", "time")
    failures = [f"failed: {run_id}: {why}" for run_id, why in outcome.failures.items()]
    return "\n".join([text_table(header, rows), *failures])


def _result(record: RunRecord) -> tuple[str, ...]:
    error = record.eval_loss_sem
    return (
        record.run_id,
        record.status,
        count(record.params_non_embedding),
        count(record.tokens),
        *_losses(causal_loss(record), record.eval_loss),
        "" if error is None else f"{error:.4f}",
        clock(record.wall_seconds),
    )


def flops_values(spec: RunSpec) -> dict:
    """Parameters and FLOPs of a run's model by component, and in sum under each convention."""
    seq_len, sequences = spec.train.seq_len, spec.train.steps * spec.train.batch_size
    forward = forward_flops(spec.model, seq_len)
    sums = {name: total_flops(forward, name) for name in CONVENTIONS}
    training = {name: train_flops(spec.model, seq_len, sequences, name) for name in CONVENTIONS}
    tokens = spec.train.tokens
    return {
        "run_id": spec.run_id,
        "seq_len": seq_len,
        "tokens": tokens,
        "parameters": parameters(spec.model),
        "cache_bytes_per_sequence": {
            "exact": cache_bytes(spec.model, seq_len),
            "slack 1.5": cache_bytes(spec.model, seq_len, 1.5),
        },
        "forward_flops_per_sequence": forward,
        "forward_flops": sums,
        "train_flops": training | {"6ND": six_nd(spec.model, tokens)},
    }


def flops_text(spec: RunSpec) -> str:
    values = flops_values(spec)
    forward, seq_len = values["forward_flops_per_sequence"], values["seq_len"]
    total = total_flops(forward, "all")
    parameter_rows = [(name, f"{n:,}") for name, n in values["parameters"].items()]
    cache_rows = [(name, f"{n:,}") for name, n in values["cache_bytes_per_sequence"].items()]
    component_rows = [
        (name, f"{f:.4g}", f"{f / seq_len:.4g}", f"{f / total:.1%}") for name, f in forward.items()
    ]
    convention_rows = [
        (
            name,
            f"{values['forward_flops'][name] / seq_len:.4g}" if name in CONVENTIONS else "",
            f"{training:.4g}",
            f"{training / values['train_flops']['6ND']:.3f}",
        )
        for name, training in values["train_flops"].items()
    ]
    header = f"{spec.run_id}: layers {', '.join(map(str, spec.model.layers))}, {seq_len} positions"
    return "\n\n".join(
        (
            header,
            text_table(("parameters", ""), parameter_rows),
            text_table(("key-value caches", "bytes of a sequence"), cache_rows),
            text_table(("forward", "per sequence", "per token", "share"), component_rows),
            text_table(
                ("convention", "forward/token", f"train {count(values['tokens'])} tokens", "/6ND"),
                convention_rows,
            ),
        )
    )
