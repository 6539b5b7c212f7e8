"""Checkpoints of a run: asynchronous, atomic, bounded in number, verified before they are used.

`Checkpoints` is for the process that trains the run: it deletes what a killed write has left, and
sets damaged checkpoints aside. Everybody else calls `read_checkpoint` or `read_weights`,
which change nothing.

checkpoints/<step>/state        the arrays of TrainState but frozen parameters, by orbax
checkpoints/<step>/meta         {"run_id", "data_fingerprint", "seconds"}, and where some are frozen
                                "base", their fingerprint
checkpoints/<step>/digest.json  {file: sha256}, written before orbax commits the folder
checkpoints/damaged-<step>      set aside
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from modjax.errors import describe, require
from modjax.files import MOST_JSON, is_disk_full, read_file, write_atomically
from modjax.training.state import TrainState, Weights

logger = logging.getLogger("modjax")
DIGEST = "digest.json"
WRITTEN_AT_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Checkpoints:
    """The checkpoints of one run, for the process that holds the run's lock.

    identity: "run_id", "data_fingerprint" and where something is frozen "base"; a checkpoint that
      carries another is refused.
    """

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, str]):
        self._folder = folder.absolute()
        self._identity = identity
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(keep),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    # orbax reads checksums of its index, not of the arrays: keep our own.
                    post_finalization_callback=self._write_digest
                ),
            ),
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, float]] | None:
        """The newest undamaged state, laid out as `abstract`, and the seconds it took to get there.

        Damaged ones are set aside with a warning. None where no checkpoint is left. Raises
        InputError where a checkpoint belongs to another run or other data.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            damage = find_damage(self._folder / str(step))
            if damage is not None:
                self._set_aside(step, damage)
                continue
            return read_checkpoint(self._folder / str(step), abstract, self._identity)
        return None

    def save(self, step: int, state: TrainState, seconds: dict[str, float]) -> None:
        """Returns once `state` may be donated, and writes it in the background.

        An error of an earlier write is raised here or in `wait`: OSError where the disk is full.
        """
        if step in self._manager.all_steps():
            return
        meta = {**self._identity, "seconds": dict(seconds)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
            meta=ocp.args.JsonSave(meta),  # type: ignore[call-arg]
        )
        with self._disk():
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when everything is on the disk."""
        with self._disk():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Raises OSError for a full disk, of which orbax and tensorstore tell in words only."""
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
                write_digest(folder)

    def _set_aside(self, step: int, damage: str) -> None:
        target = self._folder / f"damaged-{step}"
        multihost_utils.sync_global_devices("modjax: every process has found the damage")
        if jax.process_index() == 0:
            while target.exists():
                target = target.with_name(target.name + "-again")
            (self._folder / str(step)).rename(target)
            logger.warning(
                "modjax: checkpoint %d is damaged (%s): kept as %s, using the one before it",
                step,
                damage,
                target,
            )
        multihost_utils.sync_global_devices("modjax: damaged checkpoint set aside")
        self._manager.reload()


def read_checkpoint(
    folder: Path, abstract: TrainState, identity: dict[str, str]
) -> tuple[TrainState, dict[str, float]]:
    """Reads one undamaged checkpoint and changes nothing in its folder.

    Returns the state, laid out as `abstract`, and the seconds it took to get there.
    Raises InputError where `identity` says that it belongs to another run or other data.
    """
    seconds = _check_identity(folder, identity)
    return _read(folder, state=ocp.args.StandardRestore(abstract)), seconds  # type: ignore[call-arg]


def read_weights(folder: Path, abstract: Weights, identity: dict[str, str]) -> Weights:
    """Reads parameters and measured numbers only, otherwise as `read_checkpoint`."""
    _check_identity(folder, identity)
    args = ocp.args.PyTreeRestore(
        abstract._asdict(),
        ocp.checkpoint_utils.construct_restore_args(abstract._asdict()),
        partial_restore=True,
    )  # type: ignore[call-arg]
    return Weights(**_read(folder, state=args))


def _check_identity(folder: Path, identity: dict[str, str]) -> dict[str, float]:
    """Returns the seconds it took to get to a checkpoint of this identity."""
    meta = _read(folder, meta=ocp.args.JsonRestore())
    for name, value in identity.items():
        accepted = (
            f"a checkpoint of another run: this one has {name} = {value!r}; choose another "
            "folder, or delete these checkpoints"
        )
        if name == "base":
            accepted = f"the frozen weights have changed since, to {value!r}: put the old ones back"
        require(meta[name] == value, str(folder.parent), meta[name], accepted)
    return meta["seconds"]


def _read(folder: Path, **item: Any) -> Any:
    """Reads one item of a checkpoint."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        (found,) = checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**item)).values()
        return found


def write_digest(folder: Path) -> None:
    """Records the sha256 of every file in `folder` but those that orbax writes afterwards."""
    digest = {str(path.relative_to(folder)): _sha256(path) for path in _files(folder)}
    write_atomically(folder / DIGEST, json.dumps(digest, indent=1))


def find_damage(folder: Path) -> str | None:
    """Returns what differs between `folder` and its digest, or None."""
    try:
        digest = json.loads(read_file(folder / DIGEST, MOST_JSON))
        for name, expected in digest.items():
            if _sha256(folder / name) != expected:
                return f"{name} has changed"
        unknown = {str(path.relative_to(folder)) for path in _files(folder)} - digest.keys()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return describe(error)
    return f"{DIGEST} leaves out {min(unknown)}" if unknown else None


def _files(folder: Path) -> list[Path]:
    """What the digest is of."""
    others = [folder / name for name in (DIGEST, *WRITTEN_AT_COMMIT)]
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in others)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
