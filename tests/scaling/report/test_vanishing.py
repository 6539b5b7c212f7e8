"""A sweep's folder that others delete or rewrite while a verb reads it."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

from modjax.cli.main import main
from modjax.records import write_json, write_spec
from modjax.scaling.plan.experiment import load
from modjax.scaling.report import page as report
from modjax.specs import to_dict
from tests.scaling.stand_in import record_of

CONFIG = Path(__file__).parents[3] / "configs" / "tiny.py"
_before_next_look = None  # called with the path before every file is opened and folder is listed


def _hook(event, arguments):
    if _before_next_look is not None and event in ("open", "os.listdir", "os.scandir"):
        if isinstance(arguments[0], str | Path):
            _before_next_look(Path(arguments[0]))


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep of three runs: one finished, one given up, one under way."""
    workdir = tmp_path_factory.mktemp("whole") / "work"
    specs = load(str(CONFIG), ["sweep.sizes=3", "sweep.budgets=5e11"]).specs[:3]
    for i, spec in enumerate(specs):
        folder = workdir / "runs" / spec.run_id
        folder.mkdir(parents=True)
        write_spec(folder, spec)
        (folder / "lock").touch()
        steps = spec.train.steps
        line = {"step": steps, "loss": 2.0, "loss_steps": steps, "train_flops": 1e9}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        if i == 0:
            write_json(folder / "result.json", to_dict(record_of(spec)))
        if i == 1:
            write_json(folder / "failure.json", {"why": "killed"})
    plan = {"config_file": "c", "command": "c", "config": {}, "data_fingerprint": "none"}
    write_json(workdir / "plan.json", plan | {"runs": [spec.run_id for spec in specs]})
    return workdir


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


HARMS = {
    "the sweep goes": lambda workdir, path: remove(workdir),
    "the file goes": lambda workdir, path: remove(path) if path != workdir else None,
    "the runs go": lambda workdir, path: shutil.rmtree(workdir / "runs", ignore_errors=True),
    "its folder goes": lambda workdir, path: remove(path.parent) if path.parent.exists() else None,
    "it is cut": lambda workdir, path: path.write_bytes(b'{"') if path.is_file() else None,
    "it becomes a folder": lambda workdir, path: (
        (path.unlink(), path.mkdir()) if path.is_file() else None
    ),
}


def harmed_at(look, verb, workdir, harm):
    """Runs the verb, and does `harm` before its `look`th look into `workdir`.

    Returns the exit code, and whether the verb looked so often.
    """
    global _before_next_look
    looks = itertools.count()

    def before(path):
        global _before_next_look
        if workdir in (path, *path.parents) and next(looks) == look:
            _before_next_look = None
            harm(workdir, path)

    _before_next_look = before
    try:
        code = main([verb, f"--workdir={workdir}"])
    finally:
        done, _before_next_look = _before_next_look is None, None
    return code, done


@pytest.mark.parametrize("verb", ["status", "fit", "report"])
@pytest.mark.parametrize(
    "harm",
    [pytest.param(name, marks=[pytest.mark.slow] * (i > 1)) for i, name in enumerate(HARMS)],
)
def test_whatever_goes_before_it_is_read_the_verb_ends_in_order(
    whole, tmp_path, capsys, monkeypatch, verb, harm
):
    monkeypatch.setattr(report, "draw_all", lambda *arguments: {})  # seconds, and reads nothing
    for look in itertools.count():
        workdir = tmp_path / str(look)
        shutil.copytree(whole, workdir)
        code, done = harmed_at(look, verb, workdir, HARMS[harm])
        err = capsys.readouterr().err
        assert code in (0, 2), err
        if code == 2:
            assert err.count("\n") == 1 and err.startswith("modjax: ") and str(workdir) in err
        if not done:
            break
        shutil.rmtree(workdir, ignore_errors=True)
    # `fit` lists the runs and opens one result and the plan; the others open every run's files.
    assert look >= (3 if verb == "fit" else 9)
    assert code == 0
