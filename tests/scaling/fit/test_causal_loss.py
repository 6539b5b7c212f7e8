"""Fits and reports of the loss under routing that never looks ahead, which they compare by."""

import csv
import dataclasses
import json
import re

import pytest

from modjax.cli.main import main
from modjax.errors import InputError
from modjax.records import causal_loss, causal_routing
from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.report.figures import curves_figure, isoflop_figure, normalised_figure
from modjax.scaling.report.learning_curves import read_curves
from modjax.scaling.report.page import report
from modjax.scaling.report.terminal import render_text

COST = 0.05


@pytest.fixture
def records(make_sweep):
    """A planted sweep in which every routed run loses COST under causal routing."""

    def routed(r):
        flops, loss = r.flops | {"router": 1e5}, r.eval_loss + COST
        return dataclasses.replace(r, flops=flops, causal_routing="predictor", causal_loss=loss)

    sweep = make_sweep(budgets=(1e12, 1e13))
    return [r if r.variant == "dense" else routed(r) for r in sweep]


def looks_ahead(record):
    """The record of a model that can select with the future only."""
    changes = {"variant": "ec", "causal_routing": "none", "causal_loss": None}
    flops = record.flops | {"router": 1e5}
    return dataclasses.replace(record, run_id=f"ec-{record.run_id}", flops=flops, **changes)


@pytest.fixture
def with_ec(records):
    """The sweep, and an arm far better than all others that has no causal loss."""
    ec = [looks_ahead(r) for r in records if r.variant == "mod"]
    return records + [dataclasses.replace(r, eval_loss=r.eval_loss - 1) for r in ec]


def test_the_optima_move_by_what_causal_routing_costs(records):
    trained, causal = (fit_all(records, loss=loss, draws=50) for loss in ("trained", "causal"))
    for ours, theirs in zip(causal.parabolas, trained.parabolas, strict=True):
        assert ours.loss - theirs.loss == pytest.approx(0 if ours.arm == "dense" else COST)
        assert ours.optimum == pytest.approx(theirs.optimum)
    for ours, theirs in zip(causal.gaps, trained.gaps, strict=True):
        assert theirs.loss == pytest.approx(-0.03)
        assert ours.loss == pytest.approx(-0.03 + COST)


def test_the_causal_loss_is_what_arms_are_compared_by_where_nothing_is_said(records):
    assert fit_all(records, draws=50) == fit_all(records, draws=50, loss="causal")
    assert fit_all(records, draws=50).gaps[0].loss == pytest.approx(-0.03 + COST)


def test_an_arm_without_a_causal_loss_keeps_no_other_from_being_compared(records, with_ec):
    alone, beside = (fit_all(found, draws=50) for found in (records, with_ec))
    assert beside.arms == ("dense", "mod")
    assert dataclasses.replace(beside, no_causal_loss=()) == alone
    (apart,) = beside.no_causal_loss
    assert (apart.arm, apart.runs, apart.finished) == ("ec", 10, 10)
    ec = sorted((r.budget_flops, r.d_model, r.eval_loss) for r in with_ec if r.variant == "ec")
    assert [(c.budget_flops, c.d_model, c.loss) for c in apart.as_trained] == ec


def test_the_text_of_a_fit_shows_such_an_arm_in_a_table_of_its_own(with_ec):
    text = render_text(fit_all(with_ec, draws=50))
    assert "ec is not compared" in text and "--loss=trained" in text
    tables = text.split("\n\n")
    (own,) = [part for part in tables if "loss as trained" in part]
    shown = [line.split() for line in own.splitlines() if line.startswith(("dense", "mod", "ec"))]
    losses = sorted(f"{r.eval_loss:.4f}" for r in with_ec if r.variant == "ec")
    assert {row[0] for row in shown} == {"ec"} and sorted(row[-1] for row in shown) == losses
    rest = "\n\n".join(part for part in tables if part is not own)
    assert not any(line.startswith("ec ") and "compared" not in line for line in rest.splitlines())


def test_ranked_as_trained_such_an_arm_is_marked_wherever_it_is_named(with_ec, make_workdir):
    fits = fit_all(with_ec, draws=50, loss="trained")
    assert fits.arms == ("dense", "mod", "ec") and "ec" in [gap.arm for gap in fits.gaps]
    text = render_text(fits)
    assert "* marks" in text
    assert re.search(r"^ec\* ", text, re.MULTILINE) and not re.search(r"\bec\b(?!\*)", text)
    assert "mod*" not in text and "dense*" not in text
    (legend,) = isoflop_figure(with_ec, fits).legends
    assert [t.get_text() for t in legend.get_texts()] == ["dense", "mod", "ec*"]
    page = report(make_workdir(with_ec), "trained").read_text()
    numbers = page[page.index("<h2>Fits in words") : page.index("<h2>Diverged")]
    assert "ec*" in numbers and not re.search(r"\bec\b(?!\*)", numbers)


def test_an_arm_of_which_some_runs_have_a_causal_loss_is_compared_by_those(with_ec):
    kept, *others = [r for r in with_ec if r.variant == "mod"]
    odd = dataclasses.replace(looks_ahead(kept), variant="mod")
    records = [r for r in with_ec if r.variant == "dense"] + others + [odd]
    fits = fit_all(records, draws=50)
    assert fits.parabola("mod", kept.budget_flops, "parameters").runs == 4
    (apart,) = fits.no_causal_loss
    assert (apart.arm, apart.runs, apart.finished) == ("mod", 1, 10)
    assert [cell.loss for cell in apart.as_trained] == [kept.eval_loss]
    assert "1 of mod's 10 runs is not compared" in render_text(fits)


def test_a_diverged_run_goes_where_its_arm_goes(with_ec):
    def diverged(r):
        changes = {"status": "diverged", "eval_loss": None, "causal_loss": None}
        return dataclasses.replace(r, diverged_step=3, **changes)

    first = {arm: next(r for r in with_ec if r.variant == arm) for arm in ("mod", "ec")}
    records = [diverged(r) if r in first.values() else r for r in with_ec]
    fits = fit_all(records, draws=50)
    assert fits.diverged == (first["mod"].run_id,) and fits.arms == ("dense", "mod")


@pytest.mark.parametrize("how", ["a router", "no parameters, but positions that it skips"])
def test_an_earlier_record_of_a_routed_run_that_tells_no_causal_loss_has_none(records, how):
    changes = {"causal_loss": None, "causal_routing": None}
    if how != "a router":  # as in routing by attention received
        flops = {k: v for k, v in records[-1].flops.items() if k != "router"}
        active = records[-1].params_non_embedding // 2
        changes |= {"flops": flops, "params_active": active}
    old = dataclasses.replace(records[-1], **changes)
    assert causal_routing(old) is causal_loss(old) is None
    (apart,) = fit_all([*records[:-1], old], draws=50).no_causal_loss
    assert (apart.arm, apart.runs) == ("mod", 1) and "earlier" in apart.why


def test_earlier_records_of_dense_and_of_strided_layers_have_the_loss_as_trained(make_record):
    """Records told no routing then where training never looks ahead, as those of kept CSVs."""
    strided = {"flops": {"mlp": 2e7, "router": 0.0, "anchors": 1e5}, "params_active": 100_000}
    for changes in ({}, {"flops": {"mlp": 2e7, "router": 0.0}}, strided):
        record = make_record(eval_loss=2.25, **changes)
        assert (causal_routing(record), causal_loss(record)) == ("trained", 2.25)


def test_where_no_run_has_a_causal_loss_one_line_says_what_to_do(with_ec, make_workdir, capsys):
    ec = [r for r in with_ec if r.variant == "ec"]
    workdir = make_workdir(ec)
    assert main(["fit", f"--workdir={workdir}"]) == main(["report", f"--workdir={workdir}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2
    assert all("ec" in line and "--loss=trained" in line for line in err.splitlines())
    assert main(["fit", f"--workdir={workdir}", "--loss=trained"]) == 0
    with pytest.raises(InputError, match="no finished run has a causal loss"):
        fit_all(ec, draws=50)


def test_a_planned_baseline_without_a_causal_loss_is_replaced_and_said(
    with_ec, make_workdir, capsys
):
    workdir = make_workdir(with_ec)
    plan = json.loads((workdir / "plan.json").read_text())
    plan["config"] = {"sweep": {"baseline": "ec"}}
    (workdir / "plan.json").write_text(json.dumps(plan))
    assert main(["fit", f"--workdir={workdir}", "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)
    assert fits["baseline"] == "dense" and fits["no_causal_loss"][0]["arm"] == "ec"
    assert main(["fit", f"--workdir={workdir}", "--json", "--loss=trained"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "ec"
    with pytest.raises(InputError, match="baseline = 'ec': must be one of dense, mod"):
        fit_all(with_ec, baseline="ec", draws=50)


def test_figures_show_compared_runs_alone(with_ec, make_workdir):
    workdir = make_workdir(with_ec)
    text = report(workdir).read_text()
    names = {r.variant: [] for r in with_ec}
    for r in with_ec:
        names[r.variant].append(f'"run:{r.run_id}"')
    for figure in (workdir / "figures").glob("*.svg"):
        svg = figure.read_text()
        assert not any(name in svg for name in names["ec"]), figure.name
        assert figure.name == "optima.svg" or all(name in svg for name in names["mod"])
    section = text[text.index("<h2>Not compared</h2>") :].split("<h2>")[1]
    assert "ec is not compared" in section
    for r in with_ec:
        shown = f"<td>{r.eval_loss:.4f}" in section
        assert shown == (r.variant == "ec")
    summary = text[: text.index("<h2>")]
    assert "ec is not compared" in summary, "the page opens with it"


def test_a_report_says_which_loss_it_compares_and_its_table_of_runs_keeps_both(
    with_ec, make_workdir
):
    workdir = make_workdir(with_ec)
    text = report(workdir).read_text()
    assert "under routing that never looks ahead" in text
    heads = re.findall(r"<button>([^<]*)", text[text.index("<h2>Runs</h2>") :])
    causal, trained, bits = map(heads.index, ("causal loss", "trained loss", "bits/byte"))

    def keys(record, page=text):
        row = page[page.index(f'data-row="run:{record.run_id}"') :]
        cells = row[: row.index("</tr>")].split("<td")[1:]
        found = [re.search(r'data-key="([^"]*)"', cell) for cell in cells]
        return [f and f[1] for f in found], [cell.partition(">")[2].strip() for cell in cells]

    mod, ec = (next(r for r in with_ec if r.variant == arm) for arm in ("mod", "ec"))
    found, _ = keys(mod)
    assert found[causal] == f"{mod.causal_loss:.7g}" and found[trained] == f"{mod.eval_loss:.7g}"
    scaled = mod.eval_bits_per_byte * mod.causal_loss / mod.eval_loss
    assert found[bits] == f"{scaled:.7g}"
    found, shown = keys(ec)
    assert shown[causal] == shown[bits] == "" and found[trained] == f"{ec.eval_loss:.7g}"
    with open(workdir / "results.csv", newline="") as file:
        rows = {row["run_id"]: row for row in csv.DictReader(file)}
    assert float(rows[mod.run_id]["eval_loss"]) == mod.eval_loss
    assert float(rows[mod.run_id]["causal_loss"]) == mod.causal_loss
    assert float(rows[mod.run_id]["eval_bits_per_byte"]) == mod.eval_bits_per_byte
    page = report(workdir, "trained").read_text()
    assert "as they were trained" in page
    assert keys(mod, page)[1][bits] == f"{mod.eval_bits_per_byte:.4g}"


def test_axes_say_which_loss_they_show(with_ec, make_workdir):
    workdir = make_workdir(with_ec)
    for loss, said in (("causal", "Causal validation loss"), ("trained", "loss as trained")):
        fits = fit_all(with_ec, loss=loss, draws=50)
        kept = [r for r in with_ec if r.variant in fits.arms]
        assert said in isoflop_figure(kept, fits).get_supylabel()
        assert said in normalised_figure(kept, fits).axes[0].get_ylabel()
    curves = curves_figure(read_curves(workdir, kept).curves, fits)
    assert "Training loss" in curves.axes[0].get_ylabel()
