"""Time and memory of `modjax status`, `fit` and `report` on a folder of 10,000 finished runs."""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from modjax.flops import forward_flops, parameters, train_flops
from modjax.records import RunRecord, run_dir, write_spec
from modjax.specs import DataConfig, Dense, MoD, ModelSpec, Predictor, RunSpec, TrainConfig, to_dict

ARMS, BUDGETS, SIZES, SEEDS, LINES = 10, 10, 20, 5, 20
BATCH, LENGTH = 8, 128


def model(arm: int, size: int) -> ModelSpec:
    """Returns a dense model for the first arm, and models of different capacity for the others."""
    width = 16 * (size + 2)
    mod = MoD(capacity=round(0.125 + 0.05 * arm, 3), causal=Predictor())
    return ModelSpec(
        vocab_size=272,
        d_model=width,
        num_layers=2 * (1 + size // 3),
        num_heads=width // 16,
        num_kv_heads=width // 16,
        d_ff=4 * width,
        layers=(Dense(), mod) if arm else (Dense(),),
    )


def losses(budget: float, arm: int, size: int) -> float:
    """Returns a loss on a parabola in the size, whose minimum moves up with the budget."""
    centre = 4 + np.log10(budget / 1e13) * 3
    return 6 * budget**-0.04 - 0.01 * arm + 0.002 * (size - centre) ** 2


def build(workdir: Path) -> None:
    """Writes the folder of a sweep whose runs have all finished."""
    rng = np.random.default_rng(0)
    names = []
    for arm, size in itertools.product(range(ARMS), range(SIZES)):
        config = model(arm, size)
        counts, forward = parameters(config), forward_flops(config, LENGTH)
        step_flops = train_flops(config, LENGTH, BATCH)
        for budget, seed in itertools.product(np.geomspace(1e13, 1e16, BUDGETS), range(SEEDS)):
            budget, steps = float(f"{budget:.3g}"), round(budget / step_flops)
            rate = 0.2 / config.d_model
            warmup = steps // 20
            train = TrainConfig(BATCH, LENGTH, steps, rate, warmup, eval_sequences=512, seed=seed)
            spec = RunSpec(f"arm{arm}", budget, config, train, DataConfig())
            loss = losses(budget, arm, size) + 0.004 * rng.standard_normal()
            record = RunRecord(
                run_id=spec.run_id,
                variant=spec.variant,
                status="finished",
                diverged_step=None,
                budget_flops=budget,
                train_flops=steps * step_flops,
                forward_flops_per_token=step_flops / 3 / BATCH / LENGTH,
                flops=forward,
                params_total=counts["total"],
                params_non_embedding=counts["non_embedding"],
                params_active=counts["active"],
                d_model=config.d_model,
                num_layers=config.num_layers,
                tokens=train.tokens,
                epochs=train.tokens / 1e11,
                steps=steps,
                batch_size=BATCH,
                seq_len=LENGTH,
                learning_rate=rate,
                train_loss=loss + 0.1 * rng.standard_normal(),
                eval_loss=loss,
                eval_loss_sem=0.01 + 0.001 * rng.random(),
                eval_bits_per_byte=loss / np.log(2),
                eval_tokens=65_536,
                seed=seed,
                data_seed=0,
                data_fingerprint="f" * 64,
                code_version="0.1.0+1234567",
                wall_seconds=budget / 3e10 * (1 + rng.random()),
                train_seconds=budget / 3e10,
                compile_seconds=2 + rng.random(),
                eval_seconds=rng.random(),
                data_wait_seconds=rng.random() / 1000,
                median_step_seconds=step_flops / 3e10,
                device="1 x cpu",
                versions={
                    "jax": "0.10.2",
                    "jaxlib": "0.10.2",
                    "flax": "0.12.8",
                    "optax": "0.2.8",
                    "orbax-checkpoint": "0.12.8",
                    "numpy": "2.4.6",
                },
            )
            folder = run_dir(workdir, spec.run_id)
            folder.mkdir(parents=True)
            write_spec(folder, spec)
            (folder / "result.json").write_text(json.dumps(to_dict(record), indent=1) + "\n")
            (folder / "metrics.jsonl").write_text(metrics(record, step_flops, bool(arm), rng))
            names.append(spec.run_id)
    config = {"sweep": {"baseline": "arm0", "flops_per_second": 3e10}}
    plan = {
        "config_file": "configs/large.py",
        "command": "modjax sweep --config=configs/large.py",
        "config": config,
        "data_fingerprint": "f" * 64,
        "runs": names,
    }
    (workdir / "plan.json").write_text(json.dumps(plan))


def metrics(record: RunRecord, step_flops: float, routed: bool, rng: np.random.Generator) -> str:
    lines, before = [], 0
    assert record.eval_loss is not None
    for k in range(1, LINES + 1):
        step = max(1, record.steps * k // LINES)
        line = {
            "step": step,
            "tokens": step * BATCH * LENGTH,
            "train_flops": step * step_flops,
            "loss": round(record.eval_loss + 2 / k + 0.01 * rng.standard_normal(), 6),
            "loss_steps": step - before,
            "grad_norm": round(rng.random(), 7),
            "learning_rate": record.learning_rate,
        }
        if routed:
            line |= {f"router/{name}/1": round(rng.random(), 7) for name in ("mean", "accuracy")}
        lines.append(json.dumps(line))
        before = step
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Cost:
    """The CPU seconds of a process, and its peak memory in MB."""

    seconds: float
    memory: float


# A child inherits the memory count of the process that forks it, so a small one starts it.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def cost(*arguments: object) -> Cost:
    """Runs `modjax ARGUMENTS...`, which must succeed, and returns its cost."""
    command = [sys.executable, "-P", "-m", "modjax.cli", *map(str, arguments)]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    code, seconds, memory = run.stdout.split()
    assert code == "0"
    return Cost(float(seconds), float(memory))


@pytest.mark.slow
def test_ten_thousand_finished_runs_are_read_fitted_and_reported_within_bounds(tmp_path):
    build(tmp_path)
    aims = {"status": 3, "fit": 10, "report": 15}  # CPU seconds on the machine they were set on
    costs = {verb: cost(verb, "--workdir", tmp_path) for verb in aims}
    page = (tmp_path / "report.html").stat().st_size / 1e6
    for verb, used in costs.items():
        print(f"{verb}: {used.seconds:.1f} s of CPU, {used.memory:.0f} MB at its peak")
    print(f"report.html: {page:.1f} MB")
    assert page <= 8
    assert all(used.memory <= 300 for used in costs.values())
    for verb, used in costs.items():
        assert used.seconds <= 2 * aims[verb], verb
