"""One training run, from its spec to its record."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from modjax.data.token_cache import check_fingerprint
from modjax.errors import Preempted
from modjax.files import Missing, WatchedFolder
from modjax.provenance import begin, provenance
from modjax.records import RunRecord, read_record, read_spec, write_record, write_spec
from modjax.specs import Execution, RunSpec
from modjax.training.results.evaluate import eval_batch_size
from modjax.training.results.metrics import last_train_loss
from modjax.training.results.run_record import make_record
from modjax.training.trainer import Diverged, Trainer


def train(
    spec: RunSpec,
    execution: Execution,
    *,
    run_dir: Path,
    data_dir: Path,
    fingerprint: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    other_code: bool = False,
    guard: Callable[[], None] = lambda: None,
) -> RunRecord:
    """Trains a run from the newest checkpoint in `run_dir` and returns its record.

    A run that has a result.json is not trained again.

    fingerprint: fingerprint of the data that the run was planned for; None accepts any data.
    progress: called with every line that is added to metrics.jsonl, and first with the mesh and
      remat if memory decided them.
    other_code: resume a run that was begun by other code or in another environment.
    guard: called before each write. It raises an error if another process may do the run.

    Raises InputError for bad input before anything expensive starts. Raises SharedFault if the
    data or the folder is replaced during the run, and Preempted after SIGTERM.
    """
    if record := read_record(run_dir, spec.run_id):
        return record
    run = Trainer(spec, execution, data_dir, fingerprint)
    _claim(run_dir, spec)
    writes = jax.process_index() == 0
    now = provenance(spec.model, run.mesh) | {"remat": run.execution.remat}
    if progress and run.step is not None:
        progress({"step": 0, "mesh": now["mesh"], "remat": now["remat"]})
    depends_on = begin(run_dir, now, write=writes, other_code=other_code)
    steps, eval_every = spec.train.steps, spec.train.eval_every
    found = {}

    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(_sigterm())
        stack.enter_context(jax.set_mesh(run.mesh))
        start = run.restore(WatchedFolder(run_dir, guard), stack, progress)
        run.compile(start)
        with contextlib.suppress(Diverged):
            for step in range(start + 1, steps + 1):
                # Evaluates one step late: a state is saved before it is evaluated.
                if eval_every and step > 1 and (step - 1) % eval_every == 0:
                    run.evaluate(step - 1)
                run.update(step)
                stop = stopped(step)
                if stop or (step < steps and run.save_is_due(step)):
                    run.save(step)
                if stop:
                    run.checkpoints.wait()
                    raise Preempted(step)
            run.save(steps)
            found = run.evaluate(steps)
        run.finish()

    run.home.check()
    check_fingerprint(run.cache)
    record = make_record(
        spec,
        run.cache,
        run.clock,
        diverged_step=run.diverged_step,
        found=found,
        train_loss=last_train_loss(run_dir),
        device=f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
        eval_batch_size=eval_batch_size(run.mesh),
        provenance=depends_on,
    )
    if writes:
        write_record(run_dir, record)
    return record


def _claim(run_dir: Path, spec: RunSpec) -> None:
    """Makes the run's folder. Raises InputError if the folder belongs to another run."""
    try:
        read_spec(run_dir, spec.run_id)
    except Missing:
        if jax.process_index() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_spec(run_dir, spec)


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function that returns whether SIGTERM has arrived, on all processes alike.

    The function takes the current step, by which the processes agree.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python delivers signals to the main thread only
    else:
        received: list[int] = []
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        try:
            yield lambda step: bool(received)
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
