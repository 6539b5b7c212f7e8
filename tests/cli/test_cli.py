"""The command line as users see it: output, one line for bad input, exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modjax.bench import BENCHMARKS
from modjax.checks.look_ahead import Finding, Leak
from modjax.cli.main import main
from modjax.scaling.plan.experiment import load

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = f"--config={CONFIGS / 'tiny.py'}"


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    """Returns the exit code, stdout and stderr of `modjax ARGUMENTS...`."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_shows_every_verb_and_what_exit_codes_mean(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    for verb in (
        "data",
        "plan",
        "check",
        "sweep",
        "status",
        "fit",
        "report",
        "train",
        "flops",
        "aot",
        "bench",
    ):
        assert f"\n    {verb} " in out
    assert "exit codes" in out and "75" in out


@pytest.mark.parametrize("verb", ["plan", "sweep", "train", "flops", "aot"])
def test_the_help_of_experiment_verbs_explains_overrides(verb, capsys):
    code, out, _ = said(capsys, verb, "--help")
    assert code == 0 and "Config values are overridden as --config.GROUP.FIELD=VALUE" in out


@pytest.mark.parametrize(
    "verb",
    [["data", "prepare"], ["data", "show"], ["status"], ["fit"], ["report"], ["bench"]],
    ids=" ".join,
)
def test_the_help_of_other_verbs_says_nothing_of_configs(verb, capsys):
    code, out, _ = said(capsys, *verb, "--help")
    assert code == 0 and "exit codes" in out
    assert "--config" not in out


def test_the_help_of_bench_lists_what_it_can_measure(capsys):
    _, out, _ = said(capsys, "bench", "--help")
    for name, text in BENCHMARKS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", out, re.MULTILINE)


def test_the_help_of_data_prepare_says_which_files_and_which_default(capsys):
    out = " ".join(said(capsys, "data", "prepare", "--help")[1].split())
    for words in ("plain text", 'JSON lines with a "text"', ".xz or .gz", "bytes (the default)"):
        assert words in out


def test_plan_prints_every_cell_with_its_epochs(data_dir, capsys):
    code, out, err = said(capsys, "plan", TINY, f"--data-dir={data_dir}")
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if line.startswith(("dense", "mod"))]) == 30
    budgets = load(str(CONFIGS / "tiny.py")).sweep.budgets
    flops = re.search(r"\b30 runs, (\S+) training FLOPs", out)[1]
    assert float(flops) == pytest.approx(10 * sum(budgets), rel=0.01), "2 arms x 5 sizes"
    assert "too many epochs" in out, "two million tokens are not enough for the demo"


def test_check_prints_what_every_layer_claims_and_was_seen_to_do(capsys, monkeypatch):
    leak, moves = Leak(5, None, 0.25), "an edit of position 5 moves another sequence by 25.0%"
    findings = [Finding("A()", "trained", False, leak), Finding("A()", "router", True, None)]
    monkeypatch.setattr("modjax.checks.runs.probed", lambda specs: findings)
    code, out, err = said(capsys, "check", TINY)
    assert (code, err) == (0, "")
    assert [re.split("  +", line) for line in out.splitlines()[1:]] == [
        ["A()", "trained", "may look ahead", moves],
        ["A()", "router", "never looks ahead", "nothing moves before an edit"],
    ]
    findings.append(Finding("B()", "router", True, leak))
    code, out, err = said(capsys, "check", TINY, "--json")
    assert code == 2 and json.loads(out)[2]["leak"]["moved"] == 0.25
    assert err.startswith("modjax: model.layers = 'B()': looks ahead under routing 'router'")


def test_plan_without_data_still_plans(tmp_path, capsys):
    for more in ([], ["--json"]):
        code, out, err = said(capsys, "plan", TINY, f"--data-dir={tmp_path}", *more)
        assert code == 2 and out.count("mod12-") == (15 if more else 0)
        assert err.startswith("modjax: epochs unknown: data = ") and err.count("\n") == 1
        assert "modjax data prepare" in err and "epochs unknown" not in out
    assert len(json.loads(out)) == 30 and json.loads(out)[0]["epochs"] is None


def test_plan_of_a_name_that_nobody_prepared_is_no_success(data_dir, capsys):
    unknown = "--config.data.name=stdilb"
    code, out, err = said(capsys, "plan", TINY, f"--data-dir={data_dir}", unknown)
    assert code == 2 and "stdilb" in err and "30 runs" in out


def test_plan_as_json_has_the_columns_of_the_table(data_dir, capsys):
    _, out, _ = said(capsys, "plan", TINY, f"--data-dir={data_dir}", "--json")
    cells = json.loads(out)
    for cell in cells:
        assert cell["tokens"] == cell["steps"] * cell["batch_size"] * 128
        assert cell["epochs"] == pytest.approx(cell["tokens"] / 2e6, rel=1e-3)
        assert cell["achieved"] == pytest.approx(cell["train_flops"] / cell["budget_flops"])


def test_overrides_may_be_separated_by_a_space(tmp_path, capsys):
    arguments = (
        "plan",
        "--config",
        str(CONFIGS / "tiny.py"),
        "--config.sweep.seeds",
        "0,1",
        "--data-dir",
        str(tmp_path),
        "--json",
    )
    assert len(json.loads(said(capsys, *arguments)[1])) == 60


def test_flops_prints_components_that_add_up(capsys):
    config = f"--config={CONFIGS / 'single.py'}"
    code, out, _ = said(capsys, "flops", config)
    assert code == 0 and "chinchilla" in out and "6ND" in out
    (values,) = json.loads(said(capsys, "flops", config, "--json")[1])
    # d 64, 4 layers of which 2 on k = 16 of 128 positions: qkv = 6 k d^2 per routed layer.
    assert values["forward_flops_per_sequence"]["qkv"] == 6 * 64 * 64 * (2 * 128 + 2 * 16)
    assert values["parameters"]["embedding"] == 272 * 64


def test_flops_of_a_sweep_shows_one_model_per_arm(capsys):
    models = json.loads(said(capsys, "flops", TINY, "--json")[1])
    assert [model["run_id"].split("-")[0] for model in models] == ["dense", "mod12"]


BAD = {
    "unknown override": (
        ["plan", TINY, "--config.train.b3=1"],
        "--config.train.b3 = '1': unknown; known here:",
    ),
    "wrong type": (["plan", TINY, "--config.train.b2=x"], "--config.train.b2 = 'x': must be"),
    "missing value": (["plan", TINY, "--config.train.b2"], "--config.train.b2: needs a value"),
    "capacity": (
        ["plan", TINY, "--config.sweep.arms.mod12.layers=MoD(capacity=2)"],
        "MoD.capacity = 2: must be in (0, 1]",
    ),
    "no such config": (
        ["plan", "--config=none.py"],
        "--config = 'none.py': cannot be read: No such file",
    ),
    "not a sweep": (
        ["plan", f"--config={CONFIGS / 'single.py'}"],
        "has no `sweep` group: `modjax train` runs it",
    ),
    "heads": (
        ["flops", f"--config={CONFIGS / 'single.py'}", "--config.model.num_heads=5"],
        "model.d_model = 64: must be a multiple of model.num_heads = 5",
    ),
    "no run named": (["train", TINY, "--workdir=x"], "--run = None: must be one of the plan's 30"),
    "jobs": (["plan", TINY, "--jobs=0"], "--jobs = 0: must be greater than 0"),
    "unknown verb": (["brew"], "invalid choice: 'brew'"),
    "unknown option": (["plan", TINY, "--colour=red"], "unrecognized arguments: --colour=red"),
    "no workdir": (["sweep", TINY], "the following arguments are required: --workdir"),
    "no sweep here": (["status", "--workdir=nowhere"], "holds no sweep"),
    "nothing to fit": (["fit", "--workdir=nowhere"], "holds no finished run"),
    "no cache": (
        ["sweep", TINY, "--workdir=x", "--data-dir=nowhere"],
        "no token cache here; make it with `modjax data prepare`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_code_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("modjax: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


ENDLESS = {
    "text": ["data", "prepare", "--data-dir=none", "--text=endless"],
    "vocabulary": ["data", "prepare", "--data-dir=none", "--vocab=endless.model"],
    "manifest": ["sweep", TINY, "--workdir=none", "--data-dir=."],
    "config": ["plan", "--config=endless"],
    "prompts": ["sample", "--workdir=none", "--prompts=endless"],
}


@pytest.mark.parametrize("kind", ["fifo", "device", "large"])
@pytest.mark.parametrize("name", ENDLESS)
def test_input_that_never_ends_is_refused_by_name(name, kind, tmp_path, monkeypatch, capsys):
    if (name, kind) == ("text", "large"):
        return  # plain text may have any length
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib-bytes").mkdir()
    for endless in ("endless", "endless.model", "stdlib-bytes/manifest.json"):
        if kind == "fifo":
            os.mkfifo(endless)
        elif kind == "device":
            os.symlink("/dev/zero", endless)
        else:
            (tmp_path / endless).touch()
            os.truncate(endless, 3 * 10**9)  # sparse
    code, out, err = said(capsys, *ENDLESS[name])
    assert (code, out, err.count("\n")) == (2, "", 1)
    reason = " are read" if kind == "large" else "Not a regular file"
    assert reason in err and ("endless" in err or "stdlib-bytes" in err)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "raise SystemExit", "1 / 0", "def ("])
def test_a_config_that_ends_or_fails_is_one_line_and_not_a_success(code, tmp_path, capsys):
    (tmp_path / "config.py").write_text(code)
    found, out, err = said(capsys, "plan", f"--config={tmp_path / 'config.py'}")
    assert (found, out) == (2, "")
    assert "its get_config() failed" in err and err.count("\n") == 1


@pytest.mark.parametrize("verb", ["status", "fit", "report", "sweep"])
@pytest.mark.parametrize("where", ["file", "file/work", "x" * 5000])
def test_a_workdir_that_cannot_be_one_is_one_line(verb, where, data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    overrides = [TINY, f"--data-dir={data_dir}", "--config.data.max_epochs=9"] * (verb == "sweep")
    code, out, err = said(capsys, verb, f"--workdir={tmp_path / where}", *overrides)
    assert (code, out) == (2, "")
    assert err.startswith("modjax: ") and err.count("\n") == 1 and len(err) < 1000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "too large for the data"),
        (
            ["--config.sweep.recipe.batch_size=64", "--config.data.max_epochs=3"],
            "can't spend it within 1%",
        ),
        (["--config.model.vocab_size=200"], "model.vocab_size = 200: must be at least 259"),
    ],
)
def test_a_sweep_refuses_bad_cells_before_it_starts(overrides, message, data_dir, tmp_path, capsys):
    workdir = tmp_path / "work"
    code, _, err = said(
        capsys, "sweep", TINY, f"--data-dir={data_dir}", f"--workdir={workdir}", *overrides
    )
    assert code == 2 and message in err and err.count("\n") == 1
    assert not workdir.exists()


def test_light_verbs_import_neither_jax_nor_tensorflow(tmp_path):
    script = f"""
import sys
import time
from modjax.cli.main import main
assert main(["plan", {TINY!r}, "--data-dir={tmp_path}"]) == 2
assert main(["flops", {TINY!r}]) == 0
assert main(["status", "--workdir={tmp_path}"]) == 2
heavy = {{"jax", "flax", "tensorflow", "seqio", "tensorflow_datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
