"""`modjax eval` and `modjax sample` name bad input and runs that cannot be used."""

import json
import shutil

import pytest

from modjax import provenance
from modjax.records import read_records, run_dir, write_provenance
from modjax.specs import Dense, MoD, Predictor
from tests.cli.conftest import add_run
from tests.training.tiny import run_spec

pytestmark = pytest.mark.usefixtures("quick_compiles")


def one_line(result, *words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("modjax: ")
    for word in words:
        assert word in err


SAMPLE = ["sample", "--prompt=x"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["eval", "--routing=both"],
            ["--routing = 'both'", "must be one of trained, causal, paced, predictor, threshold"],
        ),
        (
            ["eval", "--routing=auxiliary"],
            ["--routing = 'auxiliary'", "trained, causal, paced, predictor, threshold"],
        ),
        (["eval", "--routing=predictor", "--slack=0"], ["--slack = 0.0", "greater than 0"]),
        (["eval", "--routing=predictor", "--slack=inf"], ["--slack = inf", "greater than 0"]),
        (["eval", "--routing=predictor", "--run=x"], ["--run = 'x'", "must be one of 1 finished"]),
        (["eval"], ["--routing"]),
        ([*SAMPLE, "--routing=both"], ["--routing = 'both'", "trained, causal, paced"]),
        (
            [*SAMPLE, "--routing=trained"],
            ["--routing = 'trained'", "must be causal, or the name of a rule"],
        ),
        ([*SAMPLE, "--temperature=-1"], ["temperature = -1.0", "must be 0 or more"]),
        ([*SAMPLE, "--top-k=-1"], ["top_k = -1", "must be 0"]),
        ([*SAMPLE, "--top-p=0"], ["top_p = 0.0", "must be in (0, 1]"]),
        ([*SAMPLE, "--slack=0"], ["--slack = 0.0", "must be greater than 0"]),
        ([*SAMPLE, "--slack=inf"], ["--slack = inf", "greater than 0"]),
        ([*SAMPLE, "--tokens=0"], ["--tokens = 0", "must be greater than 0"]),
        ([*SAMPLE, "--tokens=99999999999"], ["--tokens = 99999999999", "must be at most 1000000"]),
        (["eval", "--routing=trained", "--slack=0.5"], ["--slack = 0.5", "never looks ahead"]),
        ([*SAMPLE, "--seed=-1"], ["--seed = -1", "must be 0 or more"]),
        ([*SAMPLE, "--seed=18446744073709551616"], ["--seed = 18446744073709551616", "2**32"]),
        ([*SAMPLE, "--stop="], ["--stop = ''", "at least one character"]),
        ([*SAMPLE, "--run=x"], ["--run = 'x'", "must be one of 1 finished"]),
        ([*SAMPLE, "--prompts=y"], ["--prompts", "--prompt"]),
        (["sample", "--prompt="], ["--prompt = ''", "at least one character"]),
        (["sample", "--prompt=caf\udce9"], [r"--prompt = 'caf\udce9'", "not UTF-8 at character 3"]),
        (["sample"], ["--prompt"]),
        (["sample", "--prompts=/missing.txt"], ["--prompts = '/missing.txt'", "No such file"]),
    ],
    ids=lambda value: "-".join(value[:2]) if value[0] in ("eval", "sample") else "",
)
def test_bad_input_is_one_line(said, where, arguments, words):
    one_line(said(*arguments, *where), *words)


def test_files_of_prompts_must_be_prompts(said, where, tmp_path):
    for content in (b"", b"\n", b"one\n\ntwo\n", b"caf\xe9\n"):
        (tmp_path / "prompts.txt").write_bytes(content)
        result = said("sample", *where, f"--prompts={tmp_path / 'prompts.txt'}")
        one_line(result, "--prompts = ", "prompts.txt")
        assert "not UTF-8" in result[2] or "one prompt a line" in result[2]


def test_which_run_must_be_clear_and_able(said, where, two_runs):
    workdir, _, unable = two_runs
    there = [f"--workdir={workdir}", where[1]]
    one_line(said(*SAMPLE, *there), "--run = None", "one of the 2 finished runs", "tiny-")
    lacks = ["--routing = 'predictor'", "must be one of trained, causal, threshold"]
    for verb in (SAMPLE, ["eval"]):
        one_line(said(*verb, *there, f"--run={unable}", "--routing=predictor"), *lacks)
    lost = [f"{unable}/checkpoints/30", "'damaged or missing'", "final weights"]
    one_line(said(*SAMPLE, *there, f"--run={unable}"), *lost)


def test_a_dense_run_is_refused_because_it_has_no_router(said, where, two_runs, tmp_path):
    shutil.copytree(two_runs[0], tmp_path / "work")
    (record,) = (r for r in read_records(tmp_path / "work") if r.run_id == two_runs[1])
    dense = add_run(tmp_path / "work", record, run_spec(layers=(Dense(),)))
    found = said(
        "eval", f"--workdir={tmp_path / 'work'}", where[1], "--routing=predictor", f"--run={dense}"
    )
    one_line(found, f"--run = '{dense}'", "no routed layer")


def test_eval_of_a_folder_evaluates_the_others_and_names_each_that_fails(
    said, where, two_runs, tmp_path, monkeypatch
):
    workdir, able, _ = two_runs
    shutil.copytree(workdir, tmp_path / "work")
    (record,) = (r for r in read_records(workdir) if r.run_id == able)
    routed = (Dense(), MoD(capacity=0.25, causal=Predictor()))
    lost = add_run(tmp_path / "work", record, run_spec(layers=routed, steps=31), steps=31)
    damaged = add_run(tmp_path / "work", record, run_spec(layers=routed, steps=32), steps=32)
    (run_dir(tmp_path / "work", damaged) / "spec.json").write_text("{")
    edited = add_run(tmp_path / "work", record, run_spec(layers=routed, steps=33), steps=33)
    write_provenance(run_dir(tmp_path / "work", edited), {"code of Mine": "earlier"})
    now = provenance.source_code()
    monkeypatch.setattr(provenance, "source_code", lambda _: now | {"code of Mine": "now"})
    code, out, err = said(
        "eval", f"--workdir={tmp_path / 'work'}", where[1], "--routing=predictor", "--json"
    )
    assert code == 3
    assert [values["run_id"] for values in json.loads(out)] == [able]
    lines = sorted(err.splitlines())
    assert len(lines) == 3
    for line, name in zip(lines, sorted([lost, damaged, edited]), strict=True):
        assert line.startswith(f"modjax: failed: {name}: ")
    assert "checkpoints/31" in err and "spec.json" in err
    assert f"run = '{edited}': had other values of code of Mine (1 runs)" in err


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "cut", "empty"])
@pytest.mark.parametrize("named", [False, True], ids=["all", "named"])
@pytest.mark.parametrize("verb", [SAMPLE, ["eval", "--routing=predictor"]], ids=lambda v: v[0])
def test_a_run_whose_spec_is_damaged_is_named(
    said, where, two_runs, tmp_path, verb, named, content
):
    shutil.copytree(two_runs[0], tmp_path / "work")
    spec = run_dir(tmp_path / "work", two_runs[1]) / "spec.json"
    spec.unlink()
    if content is not None:
        spec.write_text(content)
    if verb[0] == "eval" and not named:  # of the other run too there is nothing to evaluate
        shutil.rmtree(run_dir(tmp_path / "work", two_runs[2]))
    which = [f"--run={two_runs[1]}"] * named
    found = said(*verb, f"--workdir={tmp_path / 'work'}", where[1], *which)
    one_line(found, str(spec), "damaged or missing", "writes it again")


@pytest.mark.parametrize("verb", [SAMPLE, ["eval", "--routing=predictor"]], ids=lambda v: v[0])
def test_a_folder_without_runs_or_data_is_named(said, where, tmp_path, verb):
    one_line(said(*verb, f"--workdir={tmp_path}", where[1]), "--workdir = ", "no finished run")
    one_line(said(*verb, where[0], f"--data-dir={tmp_path}"), "modjax data prepare")
