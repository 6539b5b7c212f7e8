"""`modjax aot`, and `modjax plan --topology`."""

import json
import os
from pathlib import Path

import pytest

from modjax.kernels import chips

SINGLE = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.model = {
        "vocab_size": 512, "d_model": 128, "num_layers": 2, "num_heads": 1, "num_kv_heads": 1,
        "d_ff": 512, "dtype": "bfloat16",
    }
    config.train = {
        "batch_size": 8, "seq_len": 128, "steps": 10, "learning_rate": 1e-3, "warmup_steps": 1
    }
    config.execution = {"data": 4}
    return config
"""
TINY = f"--config={Path(__file__).parents[2] / 'configs' / 'tiny.py'}"
LIBTPU = "holds the TPU compiler: pip install 'modjax[aot]'"


@pytest.fixture(autouse=True)
def environment():
    """Undoes what the verbs set for their own process."""
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "single.py").write_text(SINGLE)
    return f"--config={tmp_path / 'single.py'}"


def test_aot_prints_a_report_and_nothing_but_its_progress(modjax, config):
    pytest.importorskip("libtpu", reason=LIBTPU)
    process = modjax("aot", config, "--topology=v5e:2x2", "--json", JAX_PLATFORMS="")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert err == f"modjax: compiling {report['run_id']} for v5e:2x2 ...\n"
    assert report["chip"] == "v5e" and report["devices"] == 4 and report["memory"]["fits"]
    assert 0 < report["share"]["causal"] < report["share"]["full"] < 1


def test_a_step_that_compiles_but_does_not_fit_is_reported_and_ends_with_2(
    said, config, monkeypatch
):
    pytest.importorskip("libtpu", reason=LIBTPU)
    small = chips.CHIPS["TPU v5 lite"]._replace(memory=2**20)
    monkeypatch.setitem(chips.CHIPS, "TPU v5 lite", small)
    given = "--config.execution.fsdp=1", "--config.execution.remat=full"
    code, out, err = said("aot", config, "--topology=v5e:2x2", *given)
    assert code == 2
    assert "DOES NOT FIT" in out and "estimated cycles" in out
    assert "does not fit: it takes 0.0" in err.splitlines()[-1]
    assert "raise execution.fsdp" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--topology=v5e:5x5"], "--topology = 'v5e:5x5': must be such as v5e:4x4"),
        (["--topology=H100:2x2"], "--topology = 'H100:2x2': must be such as v5e:4x4"),
        (["--topology=v5e:2x2", "--slices=0"], "--slices = 0: must be 1 to"),
        (
            ["--topology=v5e:2x2", "--config.execution.data=3"],
            "execution.data = 3: must be 0, or make the mesh as large as the topology, 4 chips",
        ),
        (
            ["--topology=v5e:2x2", "--config.execution.tensor=2", "--config.execution.data=0"],
            "execution.tensor = 2: must divide 1, the kv_heads dimension",
        ),
        (["--topology=v5e:2x2", "--run=none"], "--run = 'none': must be one of the plan's 1 run"),
    ],
)
def test_bad_input_is_one_line(said, config, arguments, line):
    pytest.importorskip("libtpu", reason=LIBTPU)
    code, out, err = said("aot", config, *arguments)
    assert (code, out) == (2, "")
    assert line in err.splitlines()[-1]


def test_without_the_compiler_the_remedy_is_named(said, config, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    code, _, err = said("aot", config, "--topology=v5e:2x2")
    assert code == 2 and "pip install 'modjax[aot]'" in err.splitlines()[-1]


def test_a_plan_with_a_topology_has_memory_time_and_what_does_not_fit(said, tmp_path, monkeypatch):
    from modjax.aot import plan

    pytest.importorskip("libtpu", reason=LIBTPU)
    found = iter([plan.Fit(False, 20 * 2**30, None), *[plan.Fit(True, 2**30, 0.25)] * 99])
    monkeypatch.setattr(plan, "_fit", lambda *sizes: next(found))
    where = (TINY, f"--data-dir={tmp_path}", "--topology=v5e:2x2")
    code, out, err = said("plan", *where, "--json")
    assert code == 2  # the data is not prepared
    first, *rest = json.loads(out)
    assert "does not fit" in first["flags"] and first["bytes_per_chip"] == 20 * 2**30
    assert all("does not fit" not in cell["flags"] for cell in rest)
    assert rest[0]["step_seconds"] == 0.25
    programs = len({(cell["arm"], cell["d_model"], cell["batch_size"]) for cell in (first, *rest)})
    assert f"compiling 1 of {programs}: {first['run_id']} for v5e:2x2" in err
    found = iter([plan.Fit(False, None, None), *[plan.Fit(True, 2**30, 0.25)] * 99])
    _, out, _ = said("plan", *where)
    assert "GiB/chip" in out and "0.250s" in out
    _, out, _ = said("plan", *where[:2])
    assert "GiB/chip" not in out
