"""The output of `modjax eval` and `modjax sample` for a finished run."""

import ast
import contextlib
import io
import json
import re

import pytest

from modjax import provenance
from modjax.cli.main import main
from modjax.records import read_records

pytestmark = pytest.mark.usefixtures("quick_compiles")


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
    code, out, err = said(
        "eval", f"--workdir={workdir}", where[1], "--routing=predictor", "--slack=0.1"
    )
    assert (code, err) == (0, "")
    name, losses, header, row = out.splitlines()[:4]
    assert name == able and out.count("trained") == 1
    pattern = r"trained (\S+) +predictor (\S+) +difference ([+-]\S+) \+- (\S+) .* over (\S+) tokens"
    trained, causal, difference, sem, _ = re.match(pattern, losses).groups()
    assert float(trained) == pytest.approx(record.eval_loss, abs=6e-5)
    assert float(difference) == pytest.approx(float(causal) - float(trained), abs=1.5e-4)
    assert float(sem) > 0
    assert losses.endswith("cache slots for 0.1 times the capacity")
    names = "layer accuracy precision recall capacity overflow most near_ties"
    assert header.split() == names.split()
    values = dict(zip(header.split(), row.split(), strict=True))
    assert values["layer"] == "1_mod.0"
    assert values["most"] == "3.1%", "one of 32 positions"


PROMPT = ["--prompt=def f(", "--tokens=24"]


@pytest.fixture(scope="module")
def spoken(where):
    """Returns the samples of `modjax sample --json` for PROMPT."""
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
