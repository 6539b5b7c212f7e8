"""Sweeps whose code is edited meanwhile: a sweep does not mix code. Training is a stand-in."""

import dataclasses
import importlib
import json
import sys

import pytest

from modjax import provenance, records
from modjax.cli.main import main
from modjax.cli.tables import status_text
from modjax.errors import InputError
from modjax.scaling import sweep as sweeps
from modjax.scaling.engines import pool
from modjax.scaling.plan.experiment import load
from modjax.scaling.report.page import fit_workdir, render
from modjax.scaling.status import status
from modjax.specs import imports, layer
from tests.scaling.small_sweep import CONFIG, SMALL, run_ids
from tests.scaling.small_sweep import run as sweep
from tests.specs.test_imports import LAYER

pytestmark = pytest.mark.usefixtures("own_layers")

OWN_CONFIG = f"""
import runpy

def get_config():
    config = runpy.run_path({str(CONFIG)!r})["get_config"]()
    config.model.imports = ("own/mine.py",)
    config.sweep.arms.mod12.layers = "Dense(), Mine()"
    return config
"""


@pytest.fixture
def config(tmp_path):
    """A config beside a folder with a layer of one's own; it has the runs of SMALL."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(LAYER.format(name="Mine"))
    (tmp_path / "config.py").write_text(OWN_CONFIG)
    return tmp_path / "config.py"


def edit(config) -> None:
    """Changes the layer's source, for processes that start from now on."""
    path = config.parent / "own" / "mine.py"
    path.write_text(path.read_text() + "# edited\n")


def fresh(config):
    """Returns the experiment as a process reads it that has imported nothing yet."""
    for table in (layer.NAMES, layer.ORIGINS):
        table.pop("Mine", None)
    for module in [name for name in sys.modules if name.startswith("modjax_imports")]:
        del sys.modules[module]
    importlib.invalidate_caches()
    return load(str(config), SMALL)


def test_a_run_keeps_its_own_imports_with_their_path_and_a_dense_one_its_name(config):
    specs = fresh(config).specs
    dense = [spec for spec in specs if spec.variant == "dense"]
    assert [s.run_id for s in dense] == [i for i in run_ids() if i.startswith("dense")]
    assert {spec.model.imports for spec in dense} == {()}
    assert {s.model.imports for s in specs if s.variant == "mod12"} == {("own/mine.py",)}


def test_a_file_that_an_arm_lacks_is_named_with_the_arm(config):
    config.write_text(
        OWN_CONFIG.replace("return", "config.sweep.arms.mod12.imports = ['no.py']\n    return")
    )
    with pytest.raises(InputError, match=r"^sweep.arms.mod12.imports = 'no.py': no such file: /"):
        fresh(config)


def test_an_edited_layer_is_seen_and_names_the_runs_that_it_concerns(folders, config):
    outcome = sweep(folders, fresh(config))
    assert len(outcome.records) == 6 and outcome.failures == {}
    of = {record.run_id: record.provenance for record in outcome.records}
    mine = [run_id for run_id in of if run_id.startswith("mod12")]
    assert {run_id for run_id in of if "code of Mine" in of[run_id]} == set(mine)
    assert len(sweep(folders, fresh(config)).records) == 6

    edit(config)
    (folders[0] / "runs" / mine[0] / "result.json").unlink()  # it was killed
    (folders[0] / "runs" / mine[0] / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        sweep(folders, fresh(config))
    said = str(caught.value)
    assert "had other values of code of Mine (3 runs)" in said and "\n" not in said
    assert all(run_id in said for run_id in mine) and "dense" not in said
    experiment = fresh(config)
    with pytest.raises(InputError, match="code of Mine"):
        sweep(folders, experiment, only=next(s for s in experiment.specs if s.run_id == mine[0]))
    sweep(folders, experiment, only=next(s for s in experiment.specs if s.variant == "dense"))
    assert not (folders[0] / "runs" / mine[0] / "result.json").exists()

    outcome = sweep(folders, fresh(config), other_code=True)
    assert len(outcome.records) == 6
    again = next(r for r in outcome.records if r.run_id == mine[0]).provenance["code of Mine"]
    assert again.startswith(f"{of[mine[0]]['code of Mine']} then ")
    (said,) = provenance.differences(fit_workdir(folders[0])[0].records)
    assert said.startswith("the runs differ in their code of Mine: ") and mine[0] in said


def test_a_run_that_never_saved_a_state_begins_anew_with_mended_code(folders, config):
    mine = next(spec.run_id for spec in fresh(config).specs if spec.variant == "mod12")
    (folders[1] / "boom").write_text(mine)
    assert list(sweep(folders, fresh(config)).failures) == [mine]
    (folders[1] / "boom").unlink()
    for done in folders[0].glob("runs/mod12*/result.json"):  # of the layer's runs none has ended
        done.unlink()
    edit(config)
    outcome = sweep(folders, fresh(config))
    assert len(outcome.records) == 6 and outcome.failures == {}
    assert provenance.differences(outcome.records) == []


def test_workers_are_renewed_with_the_code_that_the_sweep_began_with(folders, config, monkeypatch):
    monkeypatch.setattr(pool, "RUNS_OF_A_WORKER", 2)
    experiment, started, start = fresh(config), [], pool.Pool._start

    def edited_before_the_second(engine, worker):
        if len(started) == 1:
            edit(config)
        started.append(worker)
        start(engine, worker)

    monkeypatch.setattr(pool.Pool, "_start", edited_before_the_second)
    with pytest.raises(
        InputError, match=r"^source code = 'code of Mine': was edited while the swe"
    ):
        sweep(folders, experiment)
    assert len(started) == 2
    finished = list(folders[0].glob("runs/*/finishes"))
    assert len(finished) == 2, "what the first worker did is kept"


def test_modjaxs_own_code_is_compared_at_each_renewal(folders, monkeypatch):
    code = provenance.source_code()
    monkeypatch.setattr(sweeps, "source_code", lambda: code | {"code of modjax": "earlier"})
    with pytest.raises(InputError, match=r"^source code = 'code of modjax': was edited while"):
        sweep(folders, load(str(CONFIG), SMALL))
    assert not folders[0].exists()


def test_the_folder_of_a_sweep_imports_nothing(folders, config, tmp_path, monkeypatch):
    sweep(folders, fresh(config))
    for folder in (folders[0] / "runs").glob("mod12*"):
        spec = json.loads((folder / "spec.json").read_text())
        spec["model"]["imports"] = [str(tmp_path / "trap.py"), "own_trap"]
        (folder / "spec.json").write_text(json.dumps(spec))
    for name in ("trap", "own_trap"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (folders[0] / "runs" / run_ids()[0] / "result.json").unlink()
    mine = next(i for i in (p.name for p in (folders[0] / "runs").iterdir()) if i[:5] == "mod12")
    (folders[0] / "runs" / mine / "result.json").unlink()
    layer.NAMES.pop("Mine"), layer.ORIGINS.pop("Mine")  # as in another process

    found = {run.run_id: run for run in status(folders[0]).runs}
    assert [run.state for run in found.values()].count("waiting") == 2
    assert found[mine].steps > 0 and found[mine].budget_flops == 5e11
    assert (found[mine].params_total, found[run_ids()[0]].params_total > 0) == (0, True)
    assert mine in status_text(status(folders[0]))
    spec = folders[0] / "runs" / mine / "spec.json"
    values = json.loads(spec.read_text())
    for budget in (10**400, float("nan"), True, 0, "1e12"):
        spec.write_text(json.dumps(values | {"budget_flops": budget}))
        said = next(run for run in status(folders[0]).runs if run.run_id == mine)
        assert said.state == "damaged" and str(spec.parent) in said.why
        assert mine in status_text(status(folders[0]))
    spec.write_text(json.dumps(values))
    fit_workdir(folders[0])
    with pytest.raises(InputError) as caught:
        records.read_spec(folders[0] / "runs" / mine)
    said = str(caught.value)
    assert "spec.json = 'Mine': is no layer of modjax's: give the file" in said
    assert "--imports" in said and "damaged" not in said and "delete" not in said
    assert "own_trap" not in sys.modules and not imports.IMPORTED.keys() & {"own_trap"}


def test_fit_and_report_say_in_what_the_records_differ(make_sweep, make_workdir, capsys):
    made = make_sweep(arms=("dense",), budgets=(1e12,))
    codes = ["bb", *["aa"] * (len(made) - 1)]
    workdir = make_workdir(
        [
            dataclasses.replace(record, provenance={"code of modjax": code})
            for record, code in zip(made, codes, strict=True)
        ]
    )
    assert main(["fit", f"--workdir={workdir}"]) == 0
    said = f"the runs differ in their code of modjax: bb (1: {made[0].run_id}); aa (4: "
    assert f"modjax: {said}" in capsys.readouterr().err
    found, fits = fit_workdir(workdir)
    assert said in render(workdir, found.records, fits, {})
