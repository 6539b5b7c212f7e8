"""`modjax eval` and `modjax sample` on a finished run, as a user meets them."""

import ast
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil

import jax
import pytest

from modjax import provenance
from modjax.cli.main import main
from modjax.provenance import SETTINGS
from modjax.records import read_records, run_dir, write_provenance, write_record, write_spec
from modjax.specs import Dense, MoD, Predictor
from tests.training.tiny import run_spec


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    kept = dict(os.environ)  # the verbs set where JAX caches programs
    jax.config.update("jax_disable_most_optimizations", True)
    fixed = SETTINGS.pop("jax_disable_most_optimizations")
    yield
    SETTINGS["jax_disable_most_optimizations"] = fixed
    os.environ.clear()
    os.environ.update(kept)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def where(finished_workdir, tiny_data_dir):
    return [f"--workdir={finished_workdir}", f"--data-dir={tiny_data_dir}"]


@pytest.fixture(scope="module")
def two_runs(finished_workdir, tmp_path_factory):
    """A sweep's folder with the finished run, and one whose model has no predictor."""
    workdir = tmp_path_factory.mktemp("two") / "work"
    shutil.copytree(finished_workdir, workdir)
    (record,) = read_records(workdir)
    spec = run_spec(layers=(Dense(), MoD(capacity=0.25)))
    return workdir, record.run_id, add_run(workdir, record, spec)


def add_run(workdir, record, spec, **changes) -> str:
    """Adds a run without a checkpoint, whose record is `record` with `changes`."""
    folder = run_dir(workdir, spec.run_id)
    folder.mkdir()
    write_spec(folder, spec)
    write_record(folder, dataclasses.replace(record, run_id=spec.run_id, **changes))
    return spec.run_id


@pytest.fixture
def said(capsys):
    """(exit code, stdout, stderr) of `modjax arguments...`"""

    def said(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return said


def test_eval_as_json_reports_losses_their_difference_and_every_layer(
    said, where, finished_workdir
):
    (record,) = read_records(finished_workdir)
    code, out, err = said("eval", *where, "--routing=predictor", "--json")
    assert (code, err) == (0, "")
    (values,) = json.loads(out)
    assert values["run_id"] == record.run_id
    assert values["trained"]["loss"] == pytest.approx(record.eval_loss, rel=1e-6)
    gap, layer = values["difference"], values["layers"]["1_mod.0"]
    names = {"accuracy", "precision", "recall", "capacity", "overflow", "most", "near_ties"}
    assert set(layer) == names
    assert gap["loss"] == pytest.approx(values["causal"]["loss"] - values["trained"]["loss"])

    assert gap["tokens"] == record.eval_tokens and 0 < gap["sem"] < values["trained"]["sem"]
    assert layer["capacity"] == pytest.approx(record.outcome["causal/capacity"])


def test_eval_as_text_says_the_bound_and_passes_over_runs_that_cannot(said, where, two_runs):
    workdir, able, _ = two_runs
    (record,) = (r for r in read_records(workdir) if r.run_id == able)
    code, out, err = said("eval", f"--workdir={workdir}", where[1], "--routing=predictor",
                          "--slack=0.1")  # fmt: skip
    assert (code, err) == (0, "")
    name, losses, header, row = out.splitlines()[:4]
    assert name == able and out.count("trained") == 1
    pattern = r"trained (\S+) +predictor (\S+) +difference ([+-]\S+) \+- (\S+) .* over (\S+) tokens"
    trained, causal, difference, sem, _ = re.match(pattern, losses).groups()
    assert float(trained) == pytest.approx(record.eval_loss, abs=6e-5)
    assert float(difference) == pytest.approx(float(causal) - float(trained), abs=1.5e-4)
    assert float(sem) > 0
    assert losses.endswith("room for 0.1 times the capacity")
    names = "layer accuracy precision recall capacity overflow most near_ties"
    assert header.split() == names.split()
    values = dict(zip(header.split(), row.split(), strict=True))
    assert values["layer"] == "1_mod.0"
    assert values["most"] == "3.1%", "one of 32 positions"


PROMPT = ["--prompt=def f(", "--tokens=24"]


@pytest.fixture(scope="module")
def spoken(where):
    """What `modjax sample --json` of PROMPT says."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["sample", *where, *PROMPT, "--json"]) == 0
    return json.loads(out.getvalue())


def test_sample_streams_the_text_that_json_reports(said, where, spoken):
    (values,) = spoken
    assert values["prompt"] == "def f(" and values["text"]
    assert values["routed_blocks"] == 1 and set(values["depths"]) == {0, 1}
    assert len(values["depths"]) <= 6 + 24
    assert values["overflow"] == 0
    code, out, err = said("sample", *where, *PROMPT)
    assert (code, err) == (0, "")
    assert out == values["prompt"] + values["text"] + "\n"


def test_sample_is_fixed_by_the_seed(said, where, spoken):
    (same,) = json.loads(said("sample", *where, *PROMPT, "--json", "--seed=0")[1])
    (other,) = json.loads(said("sample", *where, *PROMPT, "--json", "--seed=7")[1])
    assert [same] == spoken
    assert other["text"] != same["text"]


def test_a_warning_is_one_line_whatever_handlers_libraries_add(said, where, spoken, monkeypatch):
    monkeypatch.setattr(provenance, "_own_source", lambda: "other")
    code, out, err = said("sample", *where, *PROMPT)
    assert (code, out) == (0, spoken[0]["prompt"] + spoken[0]["text"] + "\n")
    assert re.fullmatch(r"modjax: trained with other code of modjax than this: \S+\n", err)


def test_sample_ends_before_a_stop(said, where, spoken):
    text = spoken[0]["text"]
    at = next(i for i in range(5, len(text)) if text[i].isascii() and text[i] not in text[:i])
    code, out, err = said("sample", *where, *PROMPT, f"--stop={text[at]}", "--stop=nowhere")
    assert (code, err, out) == (0, "", "def f(" + text[:at] + "\n")


def test_show_depth_colours_every_token_and_explains_itself(said, where, spoken, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")  # stands in for a terminal
    code, out, err = said("sample", *where, *PROMPT, "--show-depth")
    assert (code, err) == (0, "")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert plain.startswith("def f(" + spoken[0]["text"])
    assert re.search(r"\n0 +1 routed blocks used; [01]\.\d\d on average\n$", plain)
    text, legend = out.rstrip("\n").rsplit("\n", 1)
    assert len(set(re.findall(r"48;5;(\d+)m", text))) == 2 < len(re.findall("48;5;", legend))


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}])
def test_show_depth_without_colours_is_a_line_for_each_token(
    said, where, spoken, monkeypatch, environment
):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = said("sample", *where, *PROMPT, "--show-depth")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    *lines, empty, mean = out.splitlines()
    depths, tokens = zip(*(line.split("\t", 1) for line in lines), strict=True)
    assert list(map(int, depths)) == spoken[0]["depths"]
    pieces = [ast.literal_eval(token) for token in tokens]
    data = b"".join(p if isinstance(p, bytes) else p.encode() for p in pieces)
    assert data.decode(errors="replace") == "def f(" + spoken[0]["text"]
    expected = sum(spoken[0]["depths"]) / len(lines)
    assert (empty, mean) == ("", f"{expected:.2f} of 1 routed blocks used on average")


def test_sample_continues_a_file_of_prompts_line_by_line(said, where, tmp_path):
    prompts = ["class Ünïcode:", "x"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", "utf-8")
    arguments = ["sample", *where, f"--prompts={file}", "--tokens=5", "--temperature=0"]
    code, out, err = said(*arguments, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [values["prompt"] for values in found] == prompts
    code, out, err = said(*arguments)
    assert (code, err) == (0, "")
    assert out == "\n\n".join(values["prompt"] + values["text"] for values in found) + "\n"


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
    found = said("eval", f"--workdir={tmp_path / 'work'}", where[1], "--routing=predictor",
                 f"--run={dense}")  # fmt: skip
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
    code, out, err = said("eval", f"--workdir={tmp_path / 'work'}", where[1],
                          "--routing=predictor", "--json")  # fmt: skip
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
