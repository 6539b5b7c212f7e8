"""The records of experiments/ agree with the runs that they keep."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from experiments import check
from experiments.compare import Cases, Interval, causal, difference, keep, trained_twice
from modjax.errors import InputError
from modjax.records import read_csv, run_dir, write_record
from modjax.scaling.fit import isoflop as fit


@pytest.fixture(autouse=True)
def no_surfaces(monkeypatch):
    """Skips the loss surface: no record uses it, and it takes nine tenths of a fit's time."""
    monkeypatch.setattr(fit, "fit_surface", lambda *_, **__: None)


def readme(name: str) -> str:
    return (check.HERE / name / "README.md").read_text(encoding="utf-8")


def test_every_record_is_checked():
    assert [path.parent.name for path in sorted(check.HERE.glob("*/README.md"))] == check.NAMES


@pytest.mark.parametrize("name", check.NAMES)
def test_a_record_agrees_with_its_runs(name):
    record = check.load(name)
    text = readme(name)
    assert check.faults(text, record) == []
    assert check.renew(text, record) == text
    assert f"    python -m experiments.check {name}\n" in text


def test_every_contradiction_is_found():
    says = "moe is 0.050 above dense"
    record = SimpleNamespace(
        tables=lambda: {"losses": "| arm | loss |\n| --- | --- |\n| moe | 1.9 |"},
        claims=lambda: [(says, True)],
        GIVEN=("the paper has 1.5%",),
    )
    text = (
        "# A record\n\n<!-- table losses -->\n| arm | loss |\n| --- | --- |\n| moe | 1.9 |\n"
        "<!-- end -->\n\n- **moe is** 0.050\n  above dense, the paper has 1.5% (arXiv 2404.0).\n"
    )
    assert check.faults(text, record) == []
    for old, new in (
        ("1.9 |\n<", "1.8 |\n<"),
        ("| moe | 1.9 |\n", ""),
        ("table losses", "table others"),
        ("0.050", "0.060"),
        ("above", "below"),
        ("1.5%", "1.6%"),
        ("dense,", "dense in 3 of 4 cases,"),
        ("dense,", "dense by 7%,"),
    ):
        assert old in text
        assert check.faults(text.replace(old, new), record), new
    record.claims = lambda: [(says, False)]
    assert check.faults(text, record) == [f"does not hold: {says}"]
    record.claims = lambda: []
    assert len(check.faults(text, record)) == 1
    assert check.renew(text.replace("1.9", "1.8"), record) == text


def test_a_difference_is_the_mean_over_pairs_of_equal_width_and_seed():
    (run, *_) = read_csv(check.HERE / "fig7_mode" / "stdlib.csv")
    rng = np.random.default_rng(0)
    losses = rng.normal(2, 0.1, (3, 4, 3))  # arms, widths, seeds
    losses[0, :, :] += np.arange(4)[:, None]
    records = [
        dataclasses.replace(
            run,
            run_id=f"{arm}-{w}-{s}",
            variant=arm,
            d_model=w,
            seed=s,
            budget_flops=budget,
            eval_loss=losses[a, w, s] + (budget > 1e11),
            forward_flops_per_token=100.0 + 10 * a + w,
        )
        for (a, arm), w, s, budget in itertools.product(
            enumerate("xyz"), range(4), range(3), (1e11, 3e11)
        )
        if (arm, w, s) != ("y", 3, 2)  # its pair must be left out
    ]
    found = difference(records, "x - y", 1e11)
    of_pairs = (losses[0] - losses[1]).ravel()[:-1]
    low, high = stats.ttest_1samp(of_pairs, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [low, high])
    np.testing.assert_allclose([found.mean, found.error], [of_pairs.mean(), stats.sem(of_pairs)])
    assert found.pairs == 11 and found.ratio == (100 / 110, 103 / 113)
    assert found.varies and not difference(records, "z - y", 1e11).varies
    both = difference(records, "x - y - z + y", 1e11)
    np.testing.assert_allclose(both.mean, (losses[0] - losses[2]).ravel()[:-1].mean())


def test_routed_runs_are_compared_by_their_causal_loss_and_need_one():
    records = read_csv(check.HERE / "fig7_mode" / "stdlib.csv")
    trained = {r.run_id: r for r in records}
    for r in causal(records):
        expected = trained[r.run_id].causal_loss if r.variant != "dense" else None
        assert r.eval_loss == (expected or trained[r.run_id].eval_loss)
    unscored = [
        dataclasses.replace(r, causal_loss=None) if r.variant == "moe" else r for r in records
    ]
    with pytest.raises(InputError, match="causal_loss"):
        causal(unscored)


def test_a_tally_counts_the_significant_cases_on_each_side():
    lower, higher = Interval(-0.02, -0.03, -0.01), Interval(0.01, 0.001, 0.02)
    neither = Interval(0.005, -0.01, 0.02)
    assert Cases({"a": [lower, higher], "b": [neither, lower]}).tally == (
        "significantly lower in 2 of 4 cases and higher in 1 of 4 cases (-0.020 to +0.010)"
    )
    assert Cases({"a": [neither]}).tally == (
        "not significantly different in any case (+0.005 to +0.005)"
    )
    assert str(Cases({"a": [lower, neither]})) == (
        "-0.020 and +0.005 on a (significant in 1 of 2 cases)"
    )


def test_runs_that_were_trained_twice_are_matched_by_arm_budget_width_seed_and_batch():
    (run, *_) = read_csv(check.HERE / "fig7_mode" / "stdlib.csv")
    again = dataclasses.replace(run, variant=f"{run.variant}-lr0_2", eval_loss=1.0)
    others = [
        dataclasses.replace(again, **change)
        for change in ({"seed": 7}, {"d_model": 7}, {"variant": f"{run.variant}-lr0_1"})
    ]
    assert trained_twice([run], [again, *others]) == [(run.variant, run.eval_loss, 1.0)]


def test_a_sweep_is_kept_as_a_table(tmp_path):
    records = read_csv(check.HERE / "learning_rate" / "results.csv")
    workdir = tmp_path / "sweep"
    for r in records:
        folder = run_dir(workdir, r.run_id)
        folder.mkdir(parents=True)
        write_record(folder, r)
    ((name, found, kept),) = keep(tmp_path, [f"rates={workdir}"])
    assert (name, found, kept) == ("rates", workdir, records)
    ((_, _, again),) = keep(tmp_path, ["rates"])
    assert again == records


def test_no_kept_run_comes_from_a_tree_with_uncommitted_changes():
    kept = [path for kind in ("*.csv", "*.json") for path in check.HERE.rglob(kind)]
    assert len(kept) > 10
    for path in kept:
        assert not re.search(r"\+[0-9a-f]+-dirty", path.read_text(encoding="utf-8")), path
