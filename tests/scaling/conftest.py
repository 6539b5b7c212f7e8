"""Records without training: `make_record` builds one run, `make_sweep` a whole planted grid."""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from modjax.records import RunRecord, write_record
from modjax.scaling import sweep
from modjax.scaling.engines import batch

SLURM = Path(__file__).parent / "engines" / "slurm_stand_in.py"


def _record(**changes) -> RunRecord:
    """A finished run of a plausible small model; `changes` replace fields."""
    values = dict(
        run_id="dense-1e+12-d64-l4-00000000",
        variant="dense",
        status="finished",
        diverged_step=None,
        budget_flops=1e12,
        train_flops=1e12,
        forward_flops_per_token=4e5,
        flops={"mlp": 2e7, "qkv": 1e7, "logits": 5e6},
        params_total=230_000,
        params_non_embedding=200_000,
        params_active=200_000,
        d_model=64,
        num_layers=4,
        tokens=800_000,
        epochs=0.1,
        steps=100,
        batch_size=32,
        seq_len=256,
        learning_rate=3e-3,
        train_loss=2.0,
        eval_loss=2.0,
        eval_loss_sem=0.004,
        eval_bits_per_byte=2.9,
        eval_tokens=65_536,
        seed=0,
        data_seed=0,
        data_fingerprint="abc",
        code_version="0.1.0",
        wall_seconds=12.0,
        train_seconds=9.0,
        compile_seconds=2.0,
        eval_seconds=1.0,
        data_wait_seconds=0.01,
        median_step_seconds=0.09,
        device="cpu",
        versions={"jax": "0.10.2", "flax": "0.12.8"},
    )
    return RunRecord(**(values | changes))


def _sweep(
    *,
    arms=("dense", "mod"),
    budgets=(1e12, 3e12, 1e13),
    sizes=5,
    exponent=0.5,
    coefficient=0.2,
    gap=-0.03,
    noise=0.0,
    seeds=1,
    half_width=0.5,
    offset=0.0,
    random_seed=0,
) -> list[RunRecord]:
    """Records on exact parabolas: loss = best(C) + 0.4 (log10 N - log10 N*(C))^2 + noise.

    N* = coefficient * C^exponent for the first arm, twice that for the others (at equal forward
    FLOPs); best(C) = 6 C^-0.04, plus `gap` for the others. `offset` moves the grid, in decades.
    """
    rng = np.random.default_rng(random_seed)
    records = []
    for (i, arm), budget, seed in itertools.product(enumerate(arms), budgets, range(seeds)):
        optimum = coefficient * budget**exponent * (2 if i else 1)
        steps = np.linspace(-half_width, half_width, sizes) + offset
        for j, step in enumerate(steps):
            parameters = round(optimum * 10**step)
            flops = parameters * (1.0 if i else 2.0)
            log_ratio = math.log10(parameters / optimum)
            loss = 6 * budget**-0.04 + (gap if i else 0) + 0.4 * log_ratio**2
            name = f"{arm}-{budget:.0e}-n{j}"
            records.append(
                _record(
                    run_id=f"{name}-s{seed}",
                    variant=arm,
                    budget_flops=budget,
                    train_flops=budget,
                    forward_flops_per_token=flops,
                    params_non_embedding=parameters,
                    params_total=parameters + 16_384,
                    params_active=parameters,
                    tokens=round(budget / 3 / flops),
                    eval_loss=loss + noise * rng.standard_normal(),
                    d_model=32 * (j + 1),
                    seed=seed,
                )
            )
    return records


@pytest.fixture
def make_record():
    return _record


@pytest.fixture
def make_sweep():
    return _sweep


@pytest.fixture
def make_workdir(tmp_path):
    """Writes records, learning curves, specs and a plan as a sweep leaves them."""

    def make(records):
        for record in records:
            run_dir = tmp_path / "runs" / record.run_id
            run_dir.mkdir(parents=True)
            write_record(run_dir, record)
            last = record.eval_loss or 3.0
            steps = [1, *(record.steps * k // 20 for k in range(1, 21))]
            lines = []
            for before, step in itertools.pairwise([0, *steps]):
                loss = {"loss": last + 3 * before / step, "loss_steps": step - before}
                tokens = record.tokens * step // record.steps
                flops = record.train_flops * step / record.steps
                lines.append({"step": step, "tokens": tokens, "train_flops": flops, **loss})
            lines.append({"step": record.steps, "eval_loss": last})
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
            spec = {"variant": record.variant, "model": {"d_model": record.d_model, "vocab": 259}}
            (run_dir / "spec.json").write_text(json.dumps(spec))
        plan = {
            "config_file": "configs/tiny.py",
            "command": "modjax sweep --config=configs/tiny.py --workdir=here",
            "runs": [*(record.run_id for record in records), "dense-1e+12-not-run"],
        }
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        return tmp_path

    return make


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A workdir, and a data_dir with orders for the stand-in, which every sweep then trains with.

    The workers find the stand-in by PYTHONPATH.
    """
    monkeypatch.setattr(sweep, "JOB", "stand_in")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    orders = tmp_path / "orders"
    orders.mkdir()
    (orders / "seconds").write_text("0.05")
    return tmp_path / "work", orders


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(batch, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(batch, "SECONDS_OF_LAG", 0.3)


@pytest.fixture
def slurm(tmp_path, monkeypatch, quick) -> Path:
    """Returns the folder of the stand-in, which is on the PATH."""
    programs, home = tmp_path / "programs", tmp_path / "slurm's own"
    programs.mkdir()
    home.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {SLURM} {name} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(home))
    return home
