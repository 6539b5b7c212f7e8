"""The losses in the tables of the command line."""

import dataclasses

import pytest

from modjax.cli.tables import outcome_text, status_text
from modjax.scaling.report.prose import loss_text
from modjax.scaling.status import Status, _finished
from modjax.scaling.sweep import Outcome
from tests.scaling.conftest import _record

DENSE = _record(run_id="dense", eval_loss=2.25)
MOD = _record(run_id="mod", causal_routing="predictor", causal_loss=2.5, eval_loss=2.125)
CHOICE = _record(run_id="choice", causal_routing="none", eval_loss=1.75)
LOST = _record(run_id="lost", causal_routing="router", causal_loss=None, eval_loss=1.5)
DIVERGED = _record(run_id="diverged", status="diverged", eval_loss=None, diverged_step=3)
LOSSES = {
    "dense": ["2.2500", "2.2500"],
    "mod": ["2.5000", "2.1250"],
    "choice": ["none", "1.7500"],
    "lost": ["none", "1.5000"],
    "diverged": ["", ""],
}
RECORDS = [DENSE, MOD, CHOICE, LOST, DIVERGED]


def columns(text: str, *names: str) -> dict[str, list[str]]:
    """Returns the cells under these headings, by run. A cell ends where its heading ends."""
    header, *rows = text.partition("\n\n")[0].splitlines()
    ends = [header.index(name) + len(name) for name in names]
    return {row.split()[0]: [row[end - 11 : end].split(" ")[-1] for end in ends] for row in rows}


def test_status_and_the_outcome_of_a_sweep_show_the_causal_loss_beside_that_as_trained(tmp_path):
    status = Status([_finished(tmp_path, record) for record in RECORDS], 0.0, {})
    outcome = Outcome(RECORDS, {})
    for text in (status_text(status), outcome_text(outcome)):
        assert columns(text, "causal loss", "as trained") == LOSSES
    assert [run.causal_loss for run in status.runs] == [2.25, 2.5, None, None, None]
    assert dataclasses.asdict(status)["runs"][1]["eval_loss"] == 2.125


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (DENSE, "loss 2.2500"),
        (MOD, "causal loss 2.5000, as trained 2.1250"),
        (CHOICE, "no causal loss, as trained 1.7500"),
    ],
)
def test_what_is_said_of_a_finished_run_names_both_losses_where_they_differ(record, said):
    assert loss_text(record) == said
