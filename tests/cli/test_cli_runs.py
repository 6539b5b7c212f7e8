"""Real training through the command line, in processes of their own."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from modjax.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = f"--config={CONFIGS / 'tiny.py'}"
# Two runs of a few seconds, most of it compilation: one size, two layers.
SMALL = [
    "--config.sweep.sizes=1",
    "--config.sweep.budgets=5e9",
    "--config.train.seq_len=32",
    "--config.sweep.optimum.budget=5e9",
    "--config.sweep.optimum.params=6e3",
    "--config.sweep.shape.layer_multiple=2",
    "--config.sweep.recipe.batch_size=2",
    "--config.train.eval_sequences=4",
]


def test_a_sweep_from_config_to_status_with_real_training(modjax, data_dir, tmp_path, capsys):
    where = [f"--workdir={tmp_path / 'work'}", f"--data-dir={data_dir}"]
    process = modjax("sweep", TINY, *SMALL, *where, "--jobs=2", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    records = json.loads(out)["records"]
    assert [record["variant"] for record in records] == ["dense", "mod12"]
    for record in records:
        assert record["status"] == "finished"
        assert record["train_flops"] == pytest.approx(5e9, rel=0.01)
        # Random letters among 27: nothing below log 27 can be learned.
        assert np.log(27) - 0.1 < record["eval_loss"] < np.log(272)
    lines = [line for line in err.splitlines() if "checking what the layers claim" not in line]
    assert len(lines) == 2, f"one plain line per run, and no noise: {err}"  # a slow check says so

    plan = json.loads((tmp_path / "work" / "plan.json").read_text())
    assert plan["command"].startswith("modjax sweep --config=")
    assert sorted(plan["runs"]) == sorted(record["run_id"] for record in records)
    assert main(["status", where[0], "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["done"] == 2
    main(["plan", TINY, *SMALL, *where, "--json"])
    out = capsys.readouterr().out
    measured = sum(r["train_flops"] for r in records) / sum(r["wall_seconds"] for r in records)
    assert json.loads(out)[0]["seconds"] == pytest.approx(5e9 / measured, rel=0.01)


@pytest.mark.slow
def test_sigterm_saves_a_single_run_and_exits_with_75(modjax, data_dir, tmp_path):
    arguments = [
        "train",
        f"--config={CONFIGS / 'single.py'}",
        f"--workdir={tmp_path}",
        f"--data-dir={data_dir}",
        "--config.model.num_layers=2",
        "--config.model.d_model=16",
        "--config.model.num_heads=1",
        "--config.model.num_kv_heads=1",
        "--config.model.d_ff=32",
        "--config.train.steps=100000",
        "--config.train.seq_len=16",
        "--config.data.max_epochs=50",
        "--config.execution.log_every=5",
    ]
    process = modjax(*arguments)
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in tmp_path.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert (
        err.splitlines()[-1] == "modjax: stopped, state saved; the same command continues from here"
    )
    assert list(tmp_path.glob("runs/*/checkpoints/*"))
