"""One training run, from its spec to its record."""

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from modjax.checks.runs import check as check  # a job has `check` and `train`
from modjax.checks.runs import check_run, open_data
from modjax.data.batches import Batch, train_batch
from modjax.data.cache import TokenCache, check_fingerprint
from modjax.data.prefetch import prefetch
from modjax.errors import Preempted
from modjax.files import Home, Missing
from modjax.provenance import begin, provenance
from modjax.records import RunRecord, read_record, read_spec, write_record, write_spec
from modjax.specs import Execution, RunSpec
from modjax.training.base_weights import check_base, identity_of, initial_state
from modjax.training.checkpoint import Checkpoints
from modjax.training.mesh import make_mesh, put_batch
from modjax.training.programs import compile_programs
from modjax.training.results.clock import Clock, Pace
from modjax.training.results.evaluate import eval_batch_size, evaluate, measured, validation_batches
from modjax.training.results.metrics import MetricsWriter, last_train_loss
from modjax.training.results.record import make_record, progress_values
from modjax.training.state import abstract_model, abstract_state, forget_losses, joined

# Tokens of one read of the cache.
READ_TOKENS = 32_768


def train(
    spec: RunSpec,
    execution: Execution,
    *,
    run_dir: Path,
    data_dir: Path,
    fingerprint: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    other_code: bool = False,
) -> RunRecord:
    """Trains `spec` to its record, going on from the newest checkpoint in `run_dir`.

    fingerprint: of the data that the run's plan is for, where it is part of one.
    progress: called with every line that is added to metrics.jsonl.
    other_code: go on with a run that other code began, or that was begun in another environment.
    Returns the record without training where result.json exists. Raises InputError for bad input
    before anything expensive starts, SharedFault where the data or the folder is replaced
    meanwhile, and Preempted after SIGTERM.
    """
    if record := read_record(run_dir, spec.run_id):
        return record
    clock = Clock()
    config, steps = spec.train, spec.train.steps
    cache = open_data(spec.data, data_dir, fingerprint)
    mesh = make_mesh(execution)
    check_run(spec, execution, cache, mesh)
    model = abstract_model(spec.model, config.trained)
    check_base(spec, model)
    abstract = abstract_state(mesh, model, config)
    _claim(run_dir, spec)
    now = provenance(spec.model, mesh)
    depends_on = begin(run_dir, now, write=jax.process_index() == 0, other_code=other_code)
    home = Home(run_dir)
    identity = {"run_id": spec.run_id, "data_fingerprint": cache.manifest.fingerprint}
    start, unlogged, diverged_step, found = 0, 0, 0, {}

    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(_sigterm())
        stack.enter_context(jax.set_mesh(mesh))
        state: Any = None
        if model.weights.frozen:  # no checkpoint holds them
            state = initial_state(mesh, model, spec)
        frozen = state.frozen if state else {}
        folder, keep = run_dir / "checkpoints", execution.keep_checkpoints
        checkpoints = Checkpoints(folder, keep=keep, identity=identity | identity_of(frozen))
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(abstract)
        if restored is not None:
            state, clock.seconds = restored[0]._replace(frozen=frozen), restored[1]
            start, unlogged = int(state.step), int(state.loss_steps)
        batches = stack.enter_context(_batches(cache, spec, mesh, start))
        board = execution.tensorboard
        writer = MetricsWriter(
            run_dir, start_step=start, unlogged=unlogged, tensorboard=board, progress=progress
        )
        stack.callback(writer.close)
        clock.lap("setup")
        programs = compile_programs(mesh, model, spec, execution)
        if state is None:
            state = initial_state(mesh, model, spec)
        clock.lap("compile")

        pace = Pace(start)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        saved_at = time.monotonic()

        def log() -> int:
            """Waits for the pending metrics and writes them; returns the diverged step or 0."""
            nonlocal pending
            if pending is None:
                return 0
            (step, metrics), pending = pending, None
            values = jax.device_get(metrics)
            pace.reached(step)
            diverged = int(values.pop("diverged_step"))
            values["loss_steps"] = int(values["loss_steps"])
            home.check()
            writer.write(step, progress_values(spec, step) | values)
            return diverged

        def save(step: int) -> None:
            writer.sync()
            jax.block_until_ready(state)
            clock.lap("train")
            home.check()  # orbax would make it anew
            checkpoints.save(step, state, clock.seconds)
            clock.lap("checkpoint")
            pace.restart(step)

        def measure(step: int) -> dict[str, Any]:
            """Evaluates the state, writes its metrics, and returns the fields of the record."""
            jax.block_until_ready(state)
            clock.lap("train")
            weights, scores = joined(state.params, state.frozen, state.measured), {}
            for routing, eval_step in programs.eval_steps.items():
                windows = validation_batches(cache, config, mesh)
                scores[routing] = evaluate(eval_step, weights, windows)
            found, metrics = measured(scores, cache.manifest)
            writer.write(step, metrics)
            clock.lap("eval")
            pace.restart(step)
            return found

        for step in range(start + 1, steps + 1):
            if config.eval_every and step > 1 and (step - 1) % config.eval_every == 0:
                if diverged_step := log():
                    break
                measure(step - 1)

            waited = batches.waited_seconds
            batch = next(batches)
            # Otherwise the device had work left, and did not wait.
            if state.step.is_ready():
                clock.seconds["data_wait"] += batches.waited_seconds - waited
            state, metrics = programs.train_step(state, batch)
            records = metrics.pop("records")
            # The device is busy with this step while the host waits for the logged one before it.
            if diverged_step := log():
                break
            if step % execution.log_every == 0 or step in (1, steps):
                pending = (step, metrics | programs.statistics(records))
                state = forget_losses(state)

            stop = stopped(step)
            if stop or (step < steps and _due(saved_at, execution, step)):
                if diverged_step := log():
                    break
                save(step)
                saved_at = time.monotonic()
            if stop:
                checkpoints.wait()
                raise Preempted(step)

        diverged_step = diverged_step or log()
        clock.lap("train")
        if not diverged_step:
            save(steps)
            found = measure(steps)
            if not math.isfinite(found["eval_loss"]):
                diverged_step, found = steps, {}
        checkpoints.wait()
        clock.lap("checkpoint")

    home.check()
    check_fingerprint(cache)
    record = make_record(
        spec,
        cache,
        diverged_step=diverged_step,
        train_loss=last_train_loss(run_dir),
        found=found,
        seconds=clock.seconds,
        median_step_seconds=pace.median() or clock.seconds["train"] / steps,
        device=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        eval_batch_size=eval_batch_size(mesh),
        provenance=depends_on,
    )
    if jax.process_index() == 0:
        write_record(run_dir, record)
    return record


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether to stop, on all processes, since SIGTERM arrived."""
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


def _due(saved_at: float, execution: Execution, step: int) -> bool:
    """Returns whether to save now. Several processes agree on it, on logged steps only."""
    late = time.monotonic() - saved_at > execution.checkpoint_seconds
    if jax.process_count() == 1:
        return late
    return step % execution.log_every == 0 and bool(multihost_utils.broadcast_one_to_all(late))


def _claim(run_dir: Path, spec: RunSpec) -> None:
    """Makes the run's folder. Raises InputError where it belongs to another run."""
    try:
        read_spec(run_dir, spec.run_id)
    except Missing:
        if jax.process_index() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_spec(run_dir, spec)


def _batches(cache: TokenCache, spec: RunSpec, mesh: Mesh, start: int) -> prefetch[Batch]:
    """Returns the batches of the steps after `start` on the devices, made ahead of need."""
    config = spec.train
    # Small batches are read several at a time: a read costs about 1 ms, however small.
    steps_per_read = max(1, READ_TOKENS // (config.batch_size * config.seq_len))
    size = steps_per_read * config.batch_size

    @functools.lru_cache(maxsize=1)
    def read(index: int) -> Batch:
        # The order of windows does not depend on how many are taken at once.
        return train_batch(
            cache, seq_len=config.seq_len, batch_size=size, seed=spec.data.seed, step=index
        )

    def make(step: int) -> Batch:
        index, offset = divmod(step, steps_per_read)
        rows = slice(offset * config.batch_size, (offset + 1) * config.batch_size)
        return put_batch(Batch(*(x[rows] for x in read(index))), mesh)

    return prefetch(make, start, config.steps, depth=2 * steps_per_read)
