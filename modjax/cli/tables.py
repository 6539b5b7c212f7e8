"""Plain-text tables for the command line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from modjax.records import causal_loss
from modjax.scaling.formatting import clock, count
from modjax.scaling.plan.plan_table import PlannedRun
from modjax.scaling.report.prose import span
from modjax.scaling.report.terminal import text_table
from modjax.scaling.status import STATES, Status
from modjax.scaling.sweep import Outcome
from modjax.specs import RunSpec

if TYPE_CHECKING:
    from modjax.checks.look_ahead import Finding
    from modjax.finished.paired import Estimate
    from modjax.finished.score import Score
    from modjax.finished.sublayers import Without

Columns = Mapping[str, Callable[[Any], str]]  # header -> the cell of a row


def _table(columns: Columns, rows: Iterable[Any], left: int = 1) -> str:
    """Returns a table of one line per row. left: the number of left-aligned columns."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return text_table(list(columns), cells, left=left)


CORPUS: Columns = {  # of (manifest, name of a split, split)
    "corpus": lambda row: row[0].name,
    "vocab": lambda row: row[0].vocab,
    "ids": lambda row: str(row[0].vocab_size),
    "split": lambda row: row[1],
    "documents": lambda row: count(row[2].documents),
    "tokens": lambda row: count(row[2].tokens),
    "bytes": lambda row: count(row[2].bytes),
}


def data_text(manifests: Sequence[Manifest]) -> str:
    return _table(CORPUS, ((m, name, split) for m in manifests for name, split in m.splits.items()))


PLANNED: Columns = {
    "arm": lambda run: run.arm,
    "budget": lambda run: f"{run.budget_flops:.3g}",
    "width": lambda run: str(run.d_model),
    "layers": lambda run: str(run.num_layers),
    "total": lambda run: count(run.params_total),
    "non-emb": lambda run: count(run.params_non_embedding),
    "active": lambda run: count(run.params_active),
    "stream": lambda run: f"{count(run.stream_bytes)}B",
    "tokens": lambda run: count(run.tokens),
    "tok/par": lambda run: f"{run.tokens_per_param:.3g}",
    "steps": lambda run: str(run.steps),
    "batch": lambda run: str(run.batch_size),
    "lr": lambda run: f"{run.learning_rate:.2e}",
    "epochs": lambda run: "?" if run.epochs is None else f"{run.epochs:.2f}",
    "FLOPs": lambda run: f"{run.train_flops:.3g}",
    "achieved": lambda run: f"{run.achieved:.2%}",
    "time": lambda run: clock(run.seconds),
}
COMPILED: Columns = {
    "GiB/chip": lambda run: f"{run.bytes_per_chip / 2**30:.2f}" if run.bytes_per_chip else "",
    "step (est.)": lambda run: "" if run.step_seconds is None else f"{run.step_seconds:.3f}s",
}
FLAGS: Columns = {"flags": lambda run: ", ".join(run.flags) or "-"}


def plan_text(cells: Sequence[PlannedRun], jobs: int) -> str:
    flops, seconds = sum(c.train_flops for c in cells), sum(c.seconds for c in cells)
    flagged = sum(bool(c.flags) for c in cells)
    compiled = COMPILED if any(c.bytes_per_chip is not None for c in cells) else {}
    columns = {**PLANNED, **compiled, **FLAGS}
    return (
        f"{_table(columns, cells)}\n\n{_predictions_text(cells)}{len(cells)} runs, {flops:.3g} "
        f"training FLOPs, about {clock(seconds / jobs)} on {jobs} worker{'s' * (jobs > 1)}; "
        f"{flagged} flagged"
    )


def _predictions_text(cells: Sequence[PlannedRun]) -> str:
    """Returns what `modjax fit` can determine, or "" if no arm has two sizes at one budget."""
    predictions = {(c.budget_flops, c.arm): c.prediction for c in cells if c.prediction.sizes > 1}
    if not predictions:
        return ""
    rows = [
        (
            f"{budget:.3g}",
            arm,
            f"{p.sizes}, {count(p.low)} to {count(p.high)}",
            str(p.freedom),
            span(p.optimum_interval, count) if p.optimum_interval else "refused",
            span(p.exponent_interval, "{:.2f}".format) if p.exponent_interval else "-",
        )
        for (budget, arm), p in predictions.items()
    ]
    header = ("budget", "arm", "sizes", "freedom", "optimal N", "exponent of N")
    return (
        "What `modjax fit` can be expected to tell (95% intervals), if the loss of a run has a "
        f"noise of {cells[0].prediction.noise:g} nats (--noise) with these degrees of freedom:\n"
        f"{text_table(header, rows)}\n\n"
    )


CLAIMS: Columns = {
    "layer": lambda finding: finding.layer,
    "routing": lambda finding: finding.routing,
    "claims": lambda finding: "never looks ahead" if finding.claims else "may look ahead",
    "seen": lambda finding: str(finding.leak or "nothing moves before an edit"),
}


def claims_text(findings: "Sequence[Finding]") -> str:
    """Returns a table of layers and routings: the claim about looking ahead, and any leak seen."""
    return _table(CLAIMS, findings, left=4)


def _loss(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


DROPPED: Columns = {
    "without": lambda result: result.part,
    "of block": lambda result: str(result.layer),
    "loss": lambda result: f"{result.loss:.4f}",
    "increase": lambda result: f"{result.increase:+.4f}",
    "+-": lambda result: f"{result.sem:.4f}",
}


def dropped_text(results: "Sequence[Without]") -> str:
    """Returns a table of the losses, and the half of each kind of part that costs least."""
    lines = [_table(DROPPED, results), ""]
    for part in sorted({result.part for result in results}):
        layers = [result.layer for result in results if result.part == part]
        lines.append(f"{part.upper()} = {sorted(layers[: len(layers) // 2])}")
    return "\n".join(lines)


STATE: Columns = {
    "run": lambda run: run.run_id,
    "state": lambda run: run.state,
    "step": lambda run: f"{run.step}/{run.steps}",
    "total": lambda run: count(run.params_total) if run.params_total else "",
    "active": lambda run: count(run.params_active) if run.params_active else "",
    # Both losses are empty until the run has finished.
    "causal loss": lambda run: "" if run.eval_loss is None else _loss(run.causal_loss),
    "as trained": lambda run: "" if run.eval_loss is None else _loss(run.eval_loss),
    "": lambda run: run.why,
}


def status_text(status: Status) -> str:
    counts = ", ".join(f"{status.count(state)} {state}" for state in STATES)
    left = f"about {clock(status.remaining_seconds)} left"
    return f"{_table(STATE, status.runs)}\n\n{counts}; {left}"


RESULT: Columns = {
    "run": lambda record: record.run_id,
    "state": lambda record: record.status,
    "non-emb": lambda record: count(record.params_non_embedding),
    "tokens": lambda record: count(record.tokens),
    "causal loss": lambda record: "" if record.eval_loss is None else _loss(causal_loss(record)),
    "as trained": lambda record: "" if record.eval_loss is None else _loss(record.eval_loss),
    "+-": lambda record: "" if record.eval_loss_sem is None else f"{record.eval_loss_sem:.4f}",
    "time": lambda record: clock(record.wall_seconds),
}


def outcome_text(outcome: Outcome) -> str:
    rows = [[cell(record) for cell in RESULT.values()] for record in outcome.records]
    rows += [[run_id, "failed", *[""] * 6] for run_id in outcome.failures]
    failures = [f"failed: {run_id}: {why}" for run_id, why in outcome.failures.items()]
    return "\n".join([text_table(list(RESULT), rows), *failures])


def flops_values(spec: RunSpec) -> dict:
    """Returns a run's parameters, cache bytes, and FLOPs by component and by convention."""
    seq_len, sequences = spec.train.seq_len, spec.train.steps * spec.train.batch_size
    forward = forward_flops(spec.model, seq_len)
    training = {name: train_flops(spec.model, seq_len, sequences, name) for name in CONVENTIONS}
    return {
        "run_id": spec.run_id,
        "seq_len": seq_len,
        "tokens": spec.train.tokens,
        "parameters": parameters(spec.model),
        "cache_bytes_per_sequence": {
            "exact": cache_bytes(spec.model, seq_len),
            "slack 1.5": cache_bytes(spec.model, seq_len, 1.5),
        },
        "forward_flops_per_sequence": forward,
        "forward_flops": {name: total_flops(forward, name) for name in CONVENTIONS},
        "train_flops": training | {"6ND": six_nd(spec.model, spec.train.tokens)},
    }


def flops_text(spec: RunSpec) -> str:
    values = flops_values(spec)
    seq_len, forward, training = spec.train.seq_len, values["forward_flops"], values["train_flops"]
    parameter_rows = [(name, f"{n:,}") for name, n in values["parameters"].items()]
    cache_rows = [(name, f"{n:,}") for name, n in values["cache_bytes_per_sequence"].items()]
    component_rows = [
        (name, f"{f:.4g}", f"{f / seq_len:.4g}", f"{f / forward['all']:.1%}")
        for name, f in values["forward_flops_per_sequence"].items()
    ]
    convention_rows = [
        (
            name,
            f"{forward[name] / seq_len:.4g}" if name in forward else "",
            f"{f:.4g}",
            f"{f / training['6ND']:.3f}",
        )
        for name, f in training.items()
    ]
    trained = f"train {count(spec.train.tokens)} tokens"
    layers = ", ".join(map(str, spec.model.layers))
    tables = (
        f"{spec.run_id}: layers {layers}, {seq_len} positions",
        text_table(("parameters", ""), parameter_rows),
        text_table(("key-value caches", "bytes of a sequence"), cache_rows),
        text_table(("forward", "per sequence", "per token", "share"), component_rows),
        text_table(("convention", "forward/token", trained, "/6ND"), convention_rows),
    )
    return "\n\n".join(tables)


def layers_text(layers: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table of what layers measured. Shares are in percent."""
    names = list(dict.fromkeys(name for layer in layers.values() for name in layer))
    rows = [(at, *(_cell(layer.get(name)) for name in names)) for at, layer in layers.items()]
    return text_table(("layer", *names), rows)


def _cell(value: float | None) -> str:
    """Returns a share in percent, an integer count as it is, and "" for None."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.1%}"


def _estimate(found: "Estimate | None", form: str = ".4f") -> str:
    if found is None or found.low is None:
        return "" if found is None else f"{found.value:{form}}"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


SCORED: Columns = {  # of (score, name of a measure, what `compare` returns)
    "file": lambda row: row[0].name,
    "measure": lambda row: row[1],
    "n": lambda row: f"{row[0].count:,}",
    "score [95%]": lambda row: _estimate(row[2]["score"]),
    "base [95%]": lambda row: _estimate(row[2].get("base")),
    "difference [95%]": lambda row: _estimate(row[2].get("difference"), "+.4f"),
    "McNemar p": lambda row: f"{row[2]['mcnemar']:.2g}" if "mcnemar" in row[2] else "",
}


def scores_text(scores: "Sequence[Score]") -> str:
    """Returns a table of the measures, and one of the layers in the last score."""
    rows = [(one, name, found) for one in scores for name, found in one.measures.items()]
    layers, several = scores[-1].layers, len({one.routers for one in scores}) > 1
    columns = {"routers": lambda row: row[0].routers, **SCORED} if several else SCORED
    scored = _table(columns, rows, left=2 + several)
    return f"{scored}\n\n{layers_text(layers)}" if layers else scored
