"""Fits and reports of the loss under routing that never looks ahead."""

import csv
import dataclasses
import re

import pytest

from modjax.errors import InputError
from modjax.scaling.fit import fit_all
from modjax.scaling.report import report

COST = 0.05


@pytest.fixture
def records(make_sweep):
    """A planted sweep in which every routed run loses COST under causal routing."""
    return [
        r if r.variant == "dense" else dataclasses.replace(
            r, flops=r.flops | {"router": 1e5}, causal_routing="predictor",
            causal_loss=r.eval_loss + COST,
        )
        for r in make_sweep(budgets=(1e12, 1e13))
    ]  # fmt: skip


def test_the_optima_move_by_what_causal_routing_costs(records):
    trained, causal = (fit_all(records, loss=loss, draws=50) for loss in ("trained", "causal"))
    for ours, theirs in zip(causal.parabolas, trained.parabolas, strict=True):
        assert ours.loss - theirs.loss == pytest.approx(0 if ours.arm == "dense" else COST)
        assert ours.optimum == pytest.approx(theirs.optimum)
    for ours, theirs in zip(causal.gaps, trained.gaps, strict=True):
        assert theirs.loss == pytest.approx(-0.03)
        assert ours.loss == pytest.approx(-0.03 + COST)


@pytest.mark.parametrize("how", ["a router", "no parameters, but positions that it skips"])
def test_a_routed_run_without_a_causal_loss_is_named(records, how):
    changes = {"causal_loss": None, "causal_routing": None}
    if how != "a router":  # as in routing by attention received
        flops = {k: v for k, v in records[-1].flops.items() if k != "router"}
        active = records[-1].params_non_embedding // 2
        changes |= {"flops": flops, "params_active": active}
    records[-1] = dataclasses.replace(records[-1], **changes)
    with pytest.raises(InputError, match=f"--loss = 'causal'.*{re.escape(records[-1].run_id)}"):
        fit_all(records, loss="causal", draws=50)
    fit_all(records, loss="trained", draws=50)


def test_a_report_says_which_loss_it_shows_and_its_table_of_runs_keeps_both(records, make_workdir):
    workdir = make_workdir(records)
    text = report(workdir, "causal").read_text()
    assert ">causal loss<" in text and ">trained loss<" not in text
    assert "under routing that never looks ahead" in text
    mod = next(r for r in records if r.variant == "mod")
    bits = mod.eval_bits_per_byte * mod.causal_loss / mod.eval_loss
    shown = text[text.index(f'data-row="run:{mod.run_id}"') :]
    shown = shown[: shown.index("</tr>")]
    assert f'data-key="{mod.causal_loss:.7g}"' in shown
    assert f'"{mod.eval_loss:.7g}"' not in shown
    assert f'data-key="{bits:.7g}"' in shown
    with open(workdir / "results.csv", newline="") as file:
        rows = {row["run_id"]: row for row in csv.DictReader(file)}
    assert float(rows[mod.run_id]["eval_loss"]) == mod.eval_loss
    assert float(rows[mod.run_id]["causal_loss"]) == mod.causal_loss
    assert float(rows[mod.run_id]["eval_bits_per_byte"]) == mod.eval_bits_per_byte
    assert ">trained loss<" in report(workdir).read_text()
