"""Checkpoints of a run: asynchronous, atomic, bounded in number, and verified when they are read.

`Checkpoints` is for the process that trains the run. It deletes half-written checkpoints and sets
damaged ones aside. Other readers call `read_checkpoint`, which changes nothing.

checkpoints/<step>/state        arrays of TrainState without frozen parameters, by orbax
checkpoints/<step>/meta         {"run_id", "data_fingerprint", "seconds"}; if parameters are frozen,
                                also "base", their fingerprint
checkpoints/<step>/digest.json  {file: sha256}, written before orbax commits the folder
checkpoints/damaged-<step>      damaged checkpoint, set aside
"""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from modjax.errors import require
from modjax.files import is_copy, is_disk_full, write_atomically
from modjax.training.state import TrainState, Weights
from modjax.training.stored import DIGEST, digest_of, find_damage, pull_newest, push

Part = TypeVar("Part", TrainState, Weights)
logger = logging.getLogger("modjax")


class Checkpoints:
    """Checkpoints of one run, for the process that holds the run's lock.

    In the copy of a bucket, begins with the bucket's newest checkpoint, and writes to the bucket.

    keep: number of checkpoints to keep.
    identity: entries that the meta data of every checkpoint must have, see `read_checkpoint`.
    guard: called before each write to a bucket. It raises an error if the run was lost.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        identity: dict[str, str],
        guard: Callable[[], None] = lambda: None,
    ):
        self._folder = folder.absolute()
        self._identity, self._guard = identity, guard
        self._pushes, self._pushing = ThreadPoolExecutor(1), Future[None]()
        self._pushing.set_result(None)
        pull_newest(self._folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(keep),
            cleanup_tmp_directories=True,
            # orbax verifies its index, but not the arrays: a digest of our own does.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digest),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, float]] | None:
        """Returns the newest undamaged state and its seconds, or None if there is none.

        Sets damaged checkpoints aside with a warning. See `read_checkpoint`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._folder / str(step)
            damage = find_damage(folder)
            if damage is None:
                return read_checkpoint(folder, abstract, self._identity)
            self._set_aside(folder, damage)
        return None

    def save(self, step: int, state: TrainState, seconds: dict[str, float]) -> None:
        """Writes `state` in the background. Returns when `state` may be donated.

        This method or `wait` raises the error of an earlier write: OSError for a full disk.
        """
        self._pushing.result()
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._replace(frozen={})),  # type: ignore[call-arg]
            meta=ocp.args.JsonSave({**self._identity, "seconds": dict(seconds)}),  # type: ignore
        )
        with self._disk():
            self._manager.save(step, args=args, force=True)
        if is_copy(self._folder):
            self._pushing = self._pushes.submit(self._push)

    def wait(self) -> None:
        """Waits until everything is on disk, and in the bucket."""
        self._pushing.result()
        with self._disk():
            self._manager.wait_until_finished()
        if is_copy(self._folder):
            self._guard()
            push(self._folder)

    def close(self) -> None:
        self._pushes.shutdown()
        self._manager.close()

    def _push(self) -> None:
        """Waits until the last checkpoint is on disk, and copies it to the bucket."""
        with self._disk():
            self._manager.wait_until_finished()
        self._guard()
        try:
            push(self._folder)
        except OSError as error:
            logger.warning("modjax: %s; trying again at the next checkpoint", error)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Raises OSError for a full disk, which orbax and tensorstore report in the text only."""
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                full = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, full, str(self._folder)) from error
            raise

    def _write_digest(self) -> None:
        if jax.process_index() == 0:
            for folder in self._folder.glob("*orbax-checkpoint-tmp*"):
                write_atomically(folder / DIGEST, json.dumps(digest_of(folder), indent=1))

    def _set_aside(self, folder: Path, damage: str) -> None:
        target = folder.with_name(f"damaged-{folder.name}")
        multihost_utils.sync_global_devices("modjax: every process has found the damage")
        if jax.process_index() == 0:
            while target.exists():
                target = target.with_name(target.name + "-again")
            folder.rename(target)
            message = "modjax: checkpoint %s is damaged (%s): kept as %s, using the one before it"
            logger.warning(message, folder.name, damage, target)
        multihost_utils.sync_global_devices("modjax: damaged checkpoint set aside")
        self._manager.reload()


def read_checkpoint(
    folder: Path, abstract: Part, identity: dict[str, str]
) -> tuple[Part, dict[str, float]]:
    """Reads one undamaged checkpoint, without frozen parameters, and changes nothing in its folder.

    abstract: shapes, dtypes and shardings of the arrays to read.
    identity: entries that the checkpoint's meta data must have: "run_id", "data_fingerprint", and
      "base" if parameters are frozen.
    Returns the arrays, and the seconds by activity that the run had taken. Raises InputError if the
    checkpoint has another identity.
    """
    meta = _read(folder, meta=ocp.args.JsonRestore())
    for name, value in identity.items():
        accepted = (
            f"the frozen weights have changed since, to {value!r}: put the old ones back"
            if name == "base"
            else f"a checkpoint of another run: this one has {name} = {value!r}; choose another "
            "folder, or delete these checkpoints"
        )
        require(meta[name] == value, str(folder.parent), meta[name], accepted)
    wanted = abstract._replace(frozen={})._asdict()
    placed = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(wanted, placed, partial_restore=True)  # type: ignore[call-arg]
    return type(abstract)(**_read(folder, state=args)), meta["seconds"]


def _read(folder: Path, **item: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        (found,) = checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**item)).values()
        return found
