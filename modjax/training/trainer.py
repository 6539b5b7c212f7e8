"""A run in progress: its state on the devices and the files that it writes."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from modjax.data.batches import Batch, train_batch
from modjax.data.prefetch import prefetch
from modjax.data.token_cache import (
    TokenCache,
    cache_dir,
    check_epochs,
    check_fingerprint,
    check_vocab,
    open_cache,
)
from modjax.files import WatchedFolder
from modjax.specs import DataConfig, Execution, RunSpec
from modjax.training.base_weights import check_base, identity_of, initial_state
from modjax.training.checkpoint import Checkpoints
from modjax.training.fitting import device_memory, fitted
from modjax.training.mesh import check_batch, local_rows, make_mesh, put_batch
from modjax.training.programs import compile_programs, lower_train_step
from modjax.training.results.clock import Clock
from modjax.training.results.evaluate import evaluate, summary, validation_batches
from modjax.training.results.metrics import MetricsWriter, require_tensorboard
from modjax.training.results.run_record import progress_values
from modjax.training.state import abstract_model, abstract_state, forget_losses, joined

# Tokens of one read of the cache.
READ_TOKENS = 32_768


class Diverged(Exception):
    """A loss or gradient was not finite; see Trainer.diverged_step."""


class Trainer:
    """State of a run in progress, and the steps that training is made of.

    `update` leaves the device computing; `save` and `evaluate` wait for it. All raise Diverged.
    """

    def __init__(
        self, spec: RunSpec, execution: Execution, data_dir: Path, fingerprint: str | None
    ):
        """Checks the run and writes nothing. Raises InputError if it cannot start."""
        self.spec, self.clock, self.diverged_step = spec, Clock(), 0
        self.cache = open_data(spec.data, data_dir, fingerprint)
        check_run(spec, execution, self.cache, make_mesh(execution))
        self.model = abstract_model(spec.model, spec.train.trained)
        check_base(spec, self.model)
        self.clock.lap("setup")
        self.mesh, self.execution, self.step = fitted(
            self.model, spec.train, execution, jax.devices(), device_memory()
        )
        self.clock.lap("compile")
        self.abstract = abstract_state(self.mesh, self.model, spec.train)

    def restore(
        self, home: WatchedFolder, stack: contextlib.ExitStack, progress: Callable | None
    ) -> int:
        """Opens the files in `home`, restores the newest checkpoint, and returns its step or 0.

        `stack` closes the files. `progress` is called with every line of metrics.
        """
        self.home, run_dir = home, home.folder
        self.state: Any = None
        if self.model.weights.frozen:  # checkpoints leave them out
            self.state = initial_state(self.mesh, self.model, self.spec)
        frozen = self.state.frozen if self.state else {}
        data = self.cache.manifest.fingerprint
        identity = {"run_id": self.spec.run_id, "data_fingerprint": data} | identity_of(frozen)
        folder, keep = run_dir / "checkpoints", self.execution.keep_checkpoints
        self.checkpoints = Checkpoints(folder, keep=keep, identity=identity, guard=home.check)
        stack.callback(self.checkpoints.close)
        start, unlogged = 0, 0
        if restored := self.checkpoints.restore(self.abstract):
            self.state, self.clock.seconds = restored[0]._replace(frozen=frozen), restored[1]
            start, unlogged = int(self.state.step), int(self.state.loss_steps)
        self.batches = stack.enter_context(_batches(self.cache, self.spec, self.mesh, start))
        board = self.execution.tensorboard
        self.writer = MetricsWriter(
            run_dir, start_step=start, unlogged=unlogged, tensorboard=board, progress=progress
        )
        stack.callback(self.writer.close)
        self.clock.lap("setup")
        return start

    def compile(self, start: int) -> None:
        """Compiles the programs, and makes the initial state if none was restored."""
        if self.step is None:
            train = self.spec.train
            self.step = lower_train_step(self.mesh, self.model, train, self.execution).compile()
        self.programs = compile_programs(self.mesh, self.model, self.spec, self.step)
        if self.state is None:
            self.state = initial_state(self.mesh, self.model, self.spec)
        self.clock.lap("compile", start)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.saved_at = time.monotonic()

    def update(self, step: int) -> None:
        """Starts update `step` on the device. Meanwhile, writes the metrics of an earlier one."""
        waited = self.batches.waited_seconds
        batch = next(self.batches)
        # Otherwise the device had work left, and did not wait.
        if self.state.step.is_ready():
            self.clock.seconds["data_wait"] += self.batches.waited_seconds - waited
        self.state, metrics = self.programs.train_step(self.state, batch)
        records = metrics.pop("records")
        # The device is busy with this step while the host waits for the logged one before it.
        self._log()
        if step % self.execution.log_every == 0 or step in (1, self.spec.train.steps):
            self.pending = step, metrics | self.programs.statistics(records)
            self.state = forget_losses(self.state)

    def save_is_due(self, step: int) -> bool:
        """Returns whether to save now. Several processes agree on it, on logged steps only."""
        late = time.monotonic() - self.saved_at > self.execution.checkpoint_seconds
        if jax.process_count() == 1:
            return late
        logged = step % self.execution.log_every == 0
        return logged and bool(multihost_utils.broadcast_one_to_all(late))

    def save(self, step: int) -> None:
        """Starts to write a checkpoint of the state after `step`."""
        self._log()
        self.writer.sync()
        jax.block_until_ready(self.state)
        self.clock.lap("train")
        self.home.check()  # orbax would make it anew
        self.checkpoints.save(step, self.state, self.clock.seconds)
        self.clock.lap("checkpoint", step)
        self.saved_at = time.monotonic()

    def evaluate(self, step: int) -> dict[str, Any]:
        """Evaluates the state after `step`, writes the metrics, and returns fields of the record.

        Raises Diverged if the loss after the last step is not finite.
        """
        self._log()
        jax.block_until_ready(self.state)
        self.clock.lap("train")
        weights = joined(self.state.params, self.state.frozen, self.state.measured)
        scores = {}
        for routing, eval_step in self.programs.eval_steps.items():
            windows = validation_batches(self.cache, self.spec.train, self.mesh)
            scores[routing] = evaluate(eval_step, weights, windows)
        found, metrics = summary(scores, self.cache.manifest)
        self.home.check()
        self.writer.write(step, metrics)
        self.clock.lap("eval", step)
        if step == self.spec.train.steps and not math.isfinite(found["eval_loss"]):
            self.diverged_step = step
            raise Diverged
        return found

    def finish(self) -> None:
        """Waits until the last checkpoint is on disk."""
        self.clock.lap("train")
        self.checkpoints.wait()
        self.clock.lap("checkpoint")

    def _log(self) -> None:
        """Writes the pending metrics once they are computed. Raises Diverged."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = jax.device_get(metrics)
        self.clock.reached(step)
        self.diverged_step = int(values.pop("diverged_step"))
        values["loss_steps"] = int(values["loss_steps"])
        self.home.check()
        self.writer.write(step, progress_values(self.spec, step) | values)
        if self.diverged_step:
            raise Diverged


def _batches(cache: TokenCache, spec: RunSpec, mesh: Mesh, start: int) -> prefetch[Batch]:
    """Returns an iterator over the batches after step `start`, made ahead and put on the mesh."""
    config, size = spec.train, spec.train.batch_size
    local = local_rows(mesh, size)
    # Small batches are read several at a time: a read costs about 1 ms, however small.
    steps_per_read = max(1, READ_TOKENS // (size * config.seq_len))
    rows = np.concatenate([local + i * size for i in range(steps_per_read)])

    @functools.lru_cache(maxsize=1)
    def read(index: int) -> Batch:
        # The order of windows does not depend on how many are taken at once.
        return train_batch(
            cache,
            seq_len=config.seq_len,
            batch_size=steps_per_read * size,
            seed=spec.data.seed,
            step=index,
            rows=rows,
        )

    def make(step: int) -> Batch:
        index, offset = divmod(step, steps_per_read)
        part = slice(offset * len(local), (offset + 1) * len(local))
        return put_batch(Batch(*(x[part] for x in read(index))), mesh, size)

    return prefetch(make, start, config.steps, depth=2 * steps_per_read)


def open_data(data: DataConfig, data_dir: Path, fingerprint: str | None) -> TokenCache:
    """Returns the token cache of a run.

    Raises SharedFault unless it has the fingerprint, if one is given.
    """
    cache = open_cache(cache_dir(data_dir, data))
    check_fingerprint(cache, fingerprint)
    return cache


def check_run(spec: RunSpec, execution: Execution, cache: TokenCache, mesh: Mesh) -> None:
    """Raises InputError unless data, model, batch and mesh fit each other."""
    train = spec.train
    check_vocab(cache, spec.model)
    check_epochs(cache, spec.data, train.seq_len, train.batch_size * train.steps)
    validation_batches(cache, train, mesh)  # raises if the validation split is too small
    check_batch(mesh, train)
    if execution.tensorboard:
        require_tensorboard()
