"""Decisions of a sweep, whatever engine does its runs, and orders from other processes."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from modjax.cli.main import main
from modjax.errors import InputError
from modjax.records import run_dir, write_record
from modjax.scaling.engines import engine as engines
from modjax.scaling.engines.engine import Event, options_of, register
from modjax.scaling.plan.experiment import load
from modjax.scaling.session import MAX_ATTEMPTS, MOST_FRUITLESS
from modjax.scaling.status import status
from tests.scaling.small_sweep import CONFIG, SMALL, lines, run, run_ids, start, sweep, wait_until
from tests.scaling.stand_in import record_of

MANY = ("sweep.sizes=10", f"sweep.seeds={','.join(map(str, range(50)))}", "sweep.budgets=5e11")


@dataclass
class Scripted:
    """An engine whose runs end as told: run id -> kinds of events, "done" after the last."""

    script: dict
    slots: int = 3

    def open(self, settings, runs):
        self.workdir, self.under_way, self.starts = Path(settings.workdir), {}, []
        self.news = []
        return self

    def check(self, specs):
        self.news.append(Event("checked"))

    def room(self):
        return self.slots - len(self.under_way)

    def start(self, specs):
        assert len(specs) <= self.room()
        for spec in specs:
            assert spec.run_id not in self.under_way, "no run is done twice at a time"
            self.under_way[spec.run_id] = spec
            self.starts.append(spec.run_id)
            self.news.append(Event("started", spec.run_id))

    def events(self, seconds):
        news, self.news = self.news, []
        yield from news
        for run_id, spec in list(self.under_way.items()):
            del self.under_way[run_id]
            kinds = self.script.get(run_id, [])
            kind = kinds.pop(0) if kinds else "done"
            if kind == "done":
                write_record(run_dir(self.workdir, run_id), record_of(spec))
            yield Event(kind, run_id, f"because {kind}")

    def stop(self, received):
        return True


def do(folders, engine, overrides=SMALL):
    return run(folders, load(str(CONFIG), overrides), engine)


@pytest.mark.parametrize("kind", ["preempted", "node lost"])
def test_a_run_that_was_stopped_from_outside_costs_no_attempt(folders, kind):
    engine = Scripted({run_ids()[1]: [kind] * (MAX_ATTEMPTS + 3)})
    assert do(folders, engine).failures == {}
    assert engine.starts.count(run_ids()[1]) == MAX_ATTEMPTS + 4 and len(engine.starts) == 11


def test_a_run_that_never_gets_further_is_given_up_in_the_end(folders):
    engine = Scripted({run_ids()[1]: ["preempted"] * 99})
    why = f"because preempted, {MOST_FRUITLESS} times without getting further"
    assert do(folders, engine).failures == {run_ids()[1]: why}
    assert engine.starts.count(run_ids()[1]) == MOST_FRUITLESS


@pytest.mark.parametrize(
    ("kind", "starts"), [("died", MAX_ATTEMPTS), ("out of memory", 1), ("refused", 1)]
)
def test_causes_decide_how_often_a_run_is_tried(folders, kind, starts):
    engine = Scripted({run_ids()[-1]: [kind] * 9})
    assert do(folders, engine).failures == {run_ids()[-1]: f"because {kind}"}
    assert engine.starts.count(run_ids()[-1]) == starts
    assert status(folders[0]).count("failed") == 1
    assert do(folders, Scripted({})).failures == {}, "the next sweep tries again"


def test_a_run_that_waits_for_its_turn_again_keeps_nobody_busy(folders):
    class Waiting(Scripted):
        def events(self, seconds):
            yield from super().events(seconds) if self.news or not self.under_way else ()
            yield from [Event("waiting", run_id) for run_id in self.under_way]
            time.sleep(0.1)

    engine = Waiting({})
    assert do(folders, engine).failures == {} and len(engine.starts) == 6
    (session,) = json.loads((folders[0] / "sweep.json").read_text())
    assert session["busy_seconds"] < 0.1


def test_of_a_thousand_runs_none_is_lost_or_doubled(folders):
    specs = load(str(CONFIG), MANY).specs
    assert len(specs) == 1000
    kinds = ("died", "node lost", "preempted")
    script = {spec.run_id: [kinds[i % 3]] for i, spec in enumerate(specs) if i % 5 == 0}
    engine = Scripted(script, slots=64)
    outcome = do(folders, engine, MANY)
    assert outcome.failures == {} and len(outcome.records) == 1000
    assert len(engine.starts) == 1200 and set(engine.starts) == {spec.run_id for spec in specs}


def test_a_run_without_memory_is_given_up_at_once_and_others_go_on(folders):
    (folders[1] / "no_memory").write_text(run_ids()[0])
    failures = sweep(folders, jobs=1).failures
    assert list(failures) == [run_ids()[0]] and failures[run_ids()[0]].startswith("out of memory: ")
    assert [len(starts) for starts in lines(folders, "starts").values()] == [1] * 6


OWN = """
import subprocess, sys
from dataclasses import dataclass
from pathlib import Path
from modjax.scaling.engines.engine import register
from modjax.scaling.engines.local import LocalPool
from modjax.scaling.engines.process import Process

@dataclass(frozen=True)
class Nice:
    "Local workers that leave the cores to others."
    jobs: int = 1
    niceness: int = 1

    def open(self, settings, runs):
        return LocalPool([Polite(self.niceness) for _ in range(self.jobs)], settings)

class Polite(Process):
    def __init__(self, niceness):
        super().__init__(0)
        self.niceness = niceness

    def start(self, settings):
        super().start(settings)
        subprocess.run(["renice", "-n", str(self.niceness), "-p", str(self.process.pid)],
                       check=True, capture_output=True)

register("nice", Nice)
"""


@pytest.fixture
def own_engine(tmp_path, monkeypatch):
    """Returns the file of an engine from outside modjax."""
    monkeypatch.setattr(engines, "ENGINES", dict(engines.ENGINES))
    (tmp_path / "nice.py").write_text(OWN)
    return tmp_path / "nice.py"


def test_an_engine_of_ones_own_is_one_file(folders, own_engine, tiny_data_dir, capsys):
    command = ["sweep", f"--config={CONFIG}", f"--workdir={folders[0]}", "--jobs=2"]
    command += [f"--data-dir={tiny_data_dir}", f"--imports={own_engine}", "--config.data.name=tiny"]
    command += [f"--config.{value}" for value in SMALL]
    assert main([*command, "--engine=nice", "--engine.niceness=x"]) == 2
    said = "modjax: --engine.niceness = 'x': must be of type int, like 1\n"
    assert capsys.readouterr().err == said
    with pytest.raises(InputError, match=r"^engine = 'nice': is registered already$"):
        register("nice", Scripted)
    engine = options_of("nice", {"jobs": "2", "niceness": "3"})
    assert len(do(folders, engine).records) == 6


def test_a_config_may_name_its_engine(own_engine, tmp_path, tiny_data_dir, capsys):
    (tmp_path / "config.py").write_text(
        f"import runpy\n\ndef get_config():\n"
        f"    config = runpy.run_path({str(CONFIG)!r})['get_config']()\n"
        f"    config.engine = {{'name': 'nice', 'niceness': 'high'}}\n    return config\n"
    )
    command = ["sweep", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'work'}"]
    command += [f"--data-dir={tiny_data_dir}", "--config.data.name=tiny"]
    assert main([*command, f"--imports={own_engine}"]) == 2
    said = "modjax: --engine.niceness = 'high': must be of type int\n"
    assert capsys.readouterr().err == said
    assert main([*command, "--engine=local", "--jobs=0"]) == 2, "another engine, other options"
    assert capsys.readouterr().err == "modjax: --engine.jobs = 0: must be greater than 0\n"


@pytest.mark.parametrize("name", ["slurm", "gke"])
def test_the_example_of_an_engine_has_every_option(name):
    script = (CONFIG.parents[1] / "launch" / name / "sweep.sh").read_text()
    texts = dict(re.findall(r"--engine\.(\w+)=('[^']*'|\S*)", script))
    options = options_of(name, {field: text.strip("'") for field, text in texts.items()})
    assert texts.keys() == vars(options).keys()


def test_unknown_engines_are_one_line():
    with pytest.raises(InputError) as caught:
        options_of("cloud", {})
    assert str(caught.value).startswith("--engine = 'cloud': must be one of local, ")
    with pytest.raises(InputError, match=r"^--engine.colour = 'red': unknown; known here: jobs$"):
        options_of("local", {"colour": "red"})


def test_stop_ends_every_launcher_of_the_folder(folders, capsys):
    (folders[1] / "seconds").write_text("30")
    launchers = [start(folders, jobs=1), start(folders, jobs=1)]
    wait_until(lambda: sum(map(bool, lines(folders, "starts").values())) == 2, 60)
    assert main(["stop", f"--workdir={folders[0]}"]) == 0
    for launcher in launchers:
        _, errors = launcher.communicate(timeout=60)
        assert errors.splitlines()[-1].endswith(b"Stopped: SIGTERM")
    (folders[1] / "seconds").write_text("0.05")
    assert len(sweep(folders).records) == 6, "an earlier stop does not stop a later sweep"
    assert main(["stop", "--workdir=nowhere"]) == 2
    assert "holds no sweep" in capsys.readouterr().err


def test_a_folder_that_is_moved_after_a_stop_is_not_taken_for_a_new_stop(folders, tmp_path):
    sweep(folders)
    assert main(["stop", f"--workdir={folders[0]}"]) == 0
    (folders[0] / "runs" / run_ids()[0] / "result.json").unlink()
    (folders[1] / "seconds").write_text("2")
    launcher = start(folders, jobs=1)
    wait_until(lambda: len(lines(folders, "starts")[run_ids()[0]]) == 2, 60)
    folders[0].rename(tmp_path / "elsewhere")
    _, errors = launcher.communicate(timeout=60)
    assert b"was moved or deleted in the middle of a run" in errors.splitlines()[-1]


def test_a_relative_folder_is_the_launchers(folders, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    engine = Scripted({})
    do((Path("work"), Path("orders")), engine)
    assert engine.workdir == folders[0]


def test_other_verbs_have_no_engine(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["status", "--workdir=x", "--engine.jobs=2"])
    said = "modjax: unrecognized arguments: --engine.jobs: status has no engine\n"
    assert capsys.readouterr().err == said


def test_a_run_that_was_given_up_is_tried_again_by_the_sweep_that_still_runs(folders, capsys):
    bad, slow = run_ids()[0], run_ids()[1]
    (folders[1] / "crash").write_text(bad)
    (folders[1] / "quick").write_text(" ".join(set(run_ids()) - {slow}))
    (folders[1] / "seconds").write_text("30")
    launcher, where = start(folders), f"--workdir={folders[0]}"
    wait_until((run_dir(folders[0], bad) / "failure.json").exists, 60)
    assert main(["logs", bad, where]) == 0 and f"training {bad}" in capsys.readouterr().out
    (folders[1] / "crash").unlink()
    (folders[1] / "seconds").write_text("0.05")
    assert main(["retry", bad, where]) == 0
    wait_until(lambda: lines(folders, "finishes")[bad], 60)
    launcher.terminate()
    launcher.communicate(timeout=60)
    assert main(["retry", bad, where]) == 2
    assert f"RUN = '{bad}': is done: only runs that were given up" in capsys.readouterr().err
    assert main(["logs", "x", where]) == 2
    assert "RUN = 'x': must be one of the plan's 6 runs, such as " in capsys.readouterr().err
