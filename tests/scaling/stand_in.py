"""A stand-in for modjax.scaling.workers.job with real time, real files and real crashes.

`data_dir` has the orders, one file each:

  seconds                    the time of a run
  crash, boom                ids of runs that die by SIGKILL, and of runs that raise
  refuse, diverge            ids of runs that are refused, and of runs that diverge
  disk_full, no_memory       ids of runs that fill the disk, and of runs that fill the memory
  quick                      ids of runs that take no time
  choose                     ids of runs that choose a mesh
  uncheckable                refuses the plan
  unforeseen, no_files       raises as a fault of the program does, and as one of the machine
  stubborn                   runs ignore SIGTERM

$STAND_IN_ABORTS aborts every process as XLA does. To let a test count them, every start and every
finish adds a line to the run's folder, and every process adds one to $STAND_IN_PROCESSES.
"""

import dataclasses
import errno
import os
import signal
import sys
import time
from pathlib import Path

from modjax.errors import InputError
from modjax.flops import forward_flops, parameters, train_flops
from modjax.provenance import begin, source_code
from modjax.records import RunRecord, write_record
from modjax.specs import RunSpec

STEPS = 20

if "STAND_IN_ABORTS" in os.environ:
    print("F1129 18:32:00.403493 7 flags.cc:234] Unknown flag", file=sys.stderr, flush=True)
    os.abort()
if "STAND_IN_PROCESSES" in os.environ:
    with open(os.environ["STAND_IN_PROCESSES"], "a") as processes:
        processes.write(f"{os.getpid()}\n")


def record_of(spec: RunSpec, eval_loss: float = 2.0) -> RunRecord:
    model, train = spec.model, spec.train
    counts = parameters(model)
    spent = train_flops(model, train.seq_len, train.steps * train.batch_size)
    return RunRecord(
        run_id=spec.run_id,
        variant=spec.variant,
        status="finished",
        diverged_step=None,
        budget_flops=spec.budget_flops,
        train_flops=spent,
        forward_flops_per_token=spent / 3 / train.tokens,
        flops=forward_flops(model, train.seq_len),
        params_total=counts["total"],
        params_non_embedding=counts["non_embedding"],
        params_active=counts["active"],
        d_model=model.d_model,
        num_layers=model.num_layers,
        tokens=train.tokens,
        epochs=0.5,
        steps=train.steps,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        learning_rate=train.learning_rate,
        train_loss=eval_loss,
        eval_loss=eval_loss,
        eval_loss_sem=0.01,
        eval_bits_per_byte=None,
        eval_tokens=1000,
        seed=train.seed,
        data_seed=0,
        data_fingerprint="none",
        code_version="test",
        wall_seconds=1.0,
        train_seconds=0.8,
        compile_seconds=0.1,
        eval_seconds=0.1,
        data_wait_seconds=0.0,
        median_step_seconds=0.01,
        device="cpu",
        versions={},
    )


def check(specs, execution, *, data_dir: Path, fingerprint: str) -> None:
    if (data_dir / "uncheckable").exists():
        raise InputError("train.eval_sequences", 10**6, "ask for at most 12")
    if (data_dir / "unforeseen").exists():
        raise KeyError("unforeseen")
    if (data_dir / "no_files").exists():
        raise OSError(errno.EMFILE, "Too many open files")


def train(
    spec, execution, *, run_dir: Path, data_dir: Path, fingerprint, progress, other_code, guard
) -> RunRecord:
    def ordered(order: str) -> bool:
        path = data_dir / order
        return path.exists() and spec.run_id in path.read_text().split()

    _note(run_dir / "starts", str(os.getpid()))
    depends_on = begin(run_dir, source_code(spec.model), write=True, other_code=other_code)
    print("training", spec.run_id, flush=True)
    if ordered("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if ordered("boom"):
        raise ValueError("boom\nand more")
    if ordered("refuse"):
        raise InputError("train.batch_size", 7, "must be a multiple of the mesh")
    if ordered("diverge"):
        record = dataclasses.replace(
            record_of(spec), status="diverged", diverged_step=7, eval_loss=None, train_loss=None
        )
        write_record(run_dir, record)
        return record
    if ordered("disk_full"):
        raise OSError(errno.ENOSPC, "No space left on device")
    if ordered("no_memory"):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    if (data_dir / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ordered("choose"):
        progress({"step": 0, "mesh": "data 4, fsdp 2", "remat": "full"})
    seconds = 0.0 if ordered("quick") else float((data_dir / "seconds").read_text())
    for step in range(1, STEPS + 1):
        time.sleep(seconds / STEPS)
        guard()
        progress({"step": step, "loss": 3.0})
    record = dataclasses.replace(record_of(spec), provenance=depends_on)
    write_record(run_dir, record)
    _note(run_dir / "finishes", str(os.getpid()))
    return record


def _note(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text + "\n")
