"""Runs of the earlier format are refused by name, and their results are still read."""

import json

import pytest

from modjax.cli.main import main
from modjax.errors import InputError
from modjax.finished.runs import load
from modjax.records import read_spec, write_json, write_spec
from modjax.scaling.plan import experiment
from modjax.scaling.workdir import claim
from modjax.specs import to_dict
from modjax.training.loop import _claim
from tests.scaling.small_sweep import CONFIG
from tests.training.tiny import run_spec

OLD = "tiny-1e09-d16-l2-cfa065bb"  # the name that format 1 gave to `run_spec()`
SAID = (
    r"^[^\n]*json = 'format 1': [^\n]* neither be resumed nor opened[^\n]*choose another "
    r"workdir[^\n]*`modjax fit`[^\n]*$"
)


def test_a_run_of_the_earlier_format_is_refused_in_one_line(tmp_path):
    spec, folder = run_spec(), tmp_path / "runs" / OLD
    assert spec.run_id != OLD
    folder.mkdir(parents=True)
    write_json(folder / "spec.json", to_dict(spec))
    for use in (read_spec, load, lambda folder: _claim(folder, spec)):
        with pytest.raises(InputError, match=SAID):
            use(folder)
    write_spec(folder, spec)
    assert read_spec(folder) == spec


def test_a_sweep_does_not_go_on_in_a_workdir_of_the_earlier_format(tmp_path):
    sweep = experiment.load(str(CONFIG), ["sweep.sizes=1", "sweep.budgets=5e11"])
    claim(sweep, tmp_path, "f")
    claim(sweep, tmp_path, "f")
    plan = json.loads((tmp_path / "plan.json").read_text())
    del plan["format"]
    write_json(tmp_path / "plan.json", plan)
    with pytest.raises(InputError, match=SAID):
        claim(sweep, tmp_path, "f")


def test_the_results_of_the_earlier_format_are_still_read(make_sweep, make_workdir, capsys):
    workdir = make_workdir(make_sweep())
    plan = json.loads((workdir / "plan.json").read_text())
    assert "format" not in plan
    write_json(workdir / "plan.json", plan | {"config": {}, "data_fingerprint": "abc"})
    for verb in ("status", "fit", "report"):
        assert main([verb, f"--workdir={workdir}"]) == 0
