"""The output of `modjax bench`, also if benchmarks fail. No figure of this machine is asserted."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from modjax import bench
from modjax.bench import Row, startup, sweep
from modjax.bench.demo import budgets_with_vertices_inside
from modjax.cli.main import main as cli
from modjax.errors import InputError


@pytest.fixture
def add(monkeypatch):
    """Replaces the benchmarks by stand-ins with given rows and functions."""
    monkeypatch.setattr(bench, "BENCHMARKS", {})

    def add(name, rows, measure):
        module = ModuleType(f"modjax.bench.{name}")
        module.ROWS, module.measure = rows, measure
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(bench.BENCHMARKS, name, "a stand-in")

    return add


SPEED = Row("speed", "ratio", 1.5)
COUNTS = (Row("count", "budgets", 2, "higher"), Row("untargeted", "ratio", None))


def breaks():
    raise ValueError("the first line\nand a second")


def test_an_unknown_name_is_one_line_that_lists_the_known_ones(capsys):
    with pytest.raises(InputError, match="nonsense") as caught:
        bench.run("nonsense")
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in ("all", *bench.BENCHMARKS))
    assert cli(["bench", "nonsense"]) == 2
    assert capsys.readouterr().out == ""


def test_every_benchmark_declares_its_rows():
    whats = []
    for name in bench.BENCHMARKS:
        rows = importlib.import_module(f"modjax.bench.{name}").ROWS
        assert all(row.value is None and row.better in ("lower", "higher") for row in rows)
        whats += [row.what for row in rows]
    assert len(whats) == len(set(whats)) == 54


def test_json_holds_every_row_and_a_failure_costs_only_its_own_values(add, capsys):
    add("broken", COUNTS, breaks)
    add("works", (SPEED,), lambda: bench.fill((SPEED,), [1.25]))
    assert cli(["bench", "all", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert set(report) == {"device", "versions", "rows"}
    failed = {"value": None, "why": "ValueError: the first line and a second"}
    count = {"what": "count", "unit": "budgets", "target": 2, "better": "higher"}
    untargeted = {"what": "untargeted", "unit": "ratio", "target": None, "better": "lower"}
    speed = {"what": "speed", "value": 1.25, "unit": "ratio", "target": 1.5, "better": "lower"}
    assert report["rows"] == [count | failed, untargeted | failed, speed]
    assert captured.err.splitlines() == ["modjax: bench broken ...", "modjax: bench works ..."]


def test_the_table_says_what_was_missed_and_what_could_not_be_measured(add, capsys):
    rows = (SPEED, *COUNTS)
    add("works", rows, lambda: bench.fill(rows, [1.75, 3, 1]))
    add("broken", (SPEED,), breaks)
    bench.run("all")
    speed, count, untargeted, broken = capsys.readouterr().out.splitlines()
    assert speed.endswith("target <= 1.5: MISSED")
    assert count.endswith("target >= 2: met")
    assert untargeted.endswith("1.000 ratio")
    assert broken.endswith("not measured: ValueError: the first line and a second")


def test_an_interrupt_is_not_a_failed_benchmark(add):
    def interrupted():
        raise KeyboardInterrupt

    add("interrupted", (SPEED,), interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run("all")


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise SystemExit(7)", "it said nothing"), ("raise SystemExit('a\\nthe end')", "the end")],
)
def test_a_command_that_fails_is_told_by_its_last_line(code, said, tmp_path):
    with pytest.raises(RuntimeError, match=f"ended with [17]: {said}$"):
        bench.call([sys.executable, "-c", code], bench.fresh_environment(tmp_path))


def test_data_and_caches_of_the_user_are_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("MODJAX_DATA", "theirs")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "theirs")
    monkeypatch.setenv("XDG_CACHE_HOME", "theirs")
    monkeypatch.setenv("KEPT", "ours")
    environment = bench.fresh_environment(tmp_path)
    assert "theirs" not in environment.values() and environment["KEPT"] == "ours"
    assert environment["XDG_DATA_HOME"].startswith(str(tmp_path))


def test_a_budget_counts_when_both_arms_have_their_vertex_inside():
    def parabola(arm, budget, optimum, quantity="parameters"):
        names = ("arm", "budget_flops", "quantity", "optimum", "low", "high")
        return dict(zip(names, (arm, budget, quantity, optimum, 10.0, 100.0), strict=True))

    parabolas = [parabola("mod12", 2.0, 30.0, "forward_flops")]
    for budget, dense, mod in ((1.0, 30.0, 99.0), (2.0, 30.0, 101.0), (3.0, None, 30.0)):
        parabolas += [parabola("dense", budget, dense), parabola("mod12", budget, mod)]
    fits = {"budgets": [1.0, 2.0, 3.0], "parabolas": parabolas}
    assert budgets_with_vertices_inside(fits) == 1


def test_the_second_sweep_finds_programs_but_no_results_and_preparing_is_not_timed(monkeypatch):
    calls = []

    def records(workdir):
        seconds = 8.0 if workdir.name == "first" else 1.0
        return [SimpleNamespace(train_seconds=20.0, compile_seconds=seconds, data_wait_seconds=0.1)]

    clock = iter([0.0, 20.0, 100.0, 110.0])
    monkeypatch.setattr(sweep, "call", lambda command, where: calls.append((command[3:], where)))
    monkeypatch.setattr(sweep, "read_records", records)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(sweep, "_seconds_between", {"local": 0.01, "ray": 0.02}.get)
    monkeypatch.setattr(sweep, "_launcher", lambda: (3.0, 9.0))
    overhead, compiled, waited, *overheads = sweep.measure()
    assert [row.value for row in overheads] == [10.0, 20.0, 3.0, 9.0]
    assert overhead.value == pytest.approx(1 - 28 / (2 * 20))
    assert (compiled.value, waited.value) == (0.125, pytest.approx(0.005))
    (prepare, *_), (first, one), (second, other) = calls
    assert prepare[-2:] == ["data", "prepare"] and one == other
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert [a.startswith("--workdir=") for a, _ in differing] == [True]


def test_runs_that_do_nothing_measure_the_launcher(monkeypatch):
    monkeypatch.setattr(sweep, "SEEDS", {20: 1, 40: 2})
    monkeypatch.setattr(sweep, "SLOTS", 30)
    milliseconds, files = sweep._launcher()
    assert milliseconds > 0 and files >= 3, "its spec is written, its result written and read"


def test_the_start_up_is_measured_with_nothing_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(startup, "ROUNDS", 1)
    monkeypatch.setattr(startup, "BASE", "import json")
    monkeypatch.setattr(startup, "OURS", "import json, sys; assert '' not in sys.path")
    (row,) = startup.measure()
    assert row.value > 0
