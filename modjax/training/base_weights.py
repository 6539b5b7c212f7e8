"""The weights that a run starts from: those of its seed, or of a finished run.

A checkpoint leaves out the frozen ones. Its reader makes them again, and a fingerprint tells
whether they are still the same.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from modjax.errors import InputError, require
from modjax.files import damaged
from modjax.records import read_record, read_spec
from modjax.specs import RunSpec
from modjax.training.checkpoint import find_damage, read_checkpoint
from modjax.training.programs import init_state
from modjax.training.state import Model, TrainState, abstract_model, abstract_weights, joined


def initial_state(mesh: Mesh, model: Model, spec: RunSpec) -> TrainState:
    """Returns the state before the first step; call it under `jax.set_mesh(mesh)`.

    Raises InputError where `spec.base` is no finished run with the same weights.
    """
    weights = None
    if spec.base is not None:
        folder, base = _base(spec)
        _, weights = read_finished(mesh, base, folder, {"run_id": base.run_id})
    return init_state(mesh, model, spec.train, weights)


def check_base(spec: RunSpec, model: Model) -> None:
    """Raises InputError where `spec.base` is no finished run with weights of the same shapes."""
    if spec.base is None:
        return
    folder, base = _base(spec)
    _final_checkpoint(base, folder)
    theirs = abstract_model(base.model)
    other = _shapes(model) ^ _shapes(theirs)
    need = f"must have the weights of this model; other shapes: {min(other, default='')}"
    require(not other, "base", spec.base, need)
    check_base(base, theirs)


def _shapes(model: Model) -> set[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_leaves_with_path(joined(*model.weights))
    return {(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves}


def read_finished(
    mesh: Mesh, spec: RunSpec, folder: Path, identity: dict[str, str]
) -> tuple[Model, Any]:
    """Returns the model of a finished run and its weights after the last step, one nested dict.

    Call it under `jax.set_mesh(mesh)`. Raises InputError where the run has not finished, and where
    its weights, or those that it started from, are missing or have changed.
    """
    model = abstract_model(spec.model, spec.train.trained)
    check_base(spec, model)
    checkpoint = _final_checkpoint(spec, folder)
    _require_whole(checkpoint)
    frozen = initial_state(mesh, model, spec).frozen if model.weights.frozen else {}
    abstract = abstract_weights(mesh, model)
    try:
        weights, _ = read_checkpoint(checkpoint, abstract, identity | identity_of(frozen))
    except Exception:  # orbax has many errors for files that vanish while it reads
        _require_whole(checkpoint)
        raise
    return model, joined(*weights._replace(frozen=frozen))


def identity_of(frozen: Any) -> dict[str, str]:
    """Returns what the meta data of a checkpoint says of the frozen parameters; {} for none."""
    return {"base": fingerprint(frozen)} if frozen else {}


def fingerprint(params: Any) -> str:
    """Returns a digest of parameters, the same however they lie on devices."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    said = [(jax.tree_util.keystr(p), x.shape, str(x.dtype), int(_digits(x))) for p, x in leaves]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


@jax.jit
def _digits(leaf: jax.Array) -> jax.Array:
    """Returns a number that depends on every bit of an array and its place, but on no sharding."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    places = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
    for factor in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D):
        bits = (bits ^ places) * jnp.uint32(factor)
        bits ^= bits >> jnp.uint32(15)
    return jnp.sum(bits, dtype=jnp.uint32)


def _base(spec: RunSpec) -> tuple[Path, RunSpec]:
    """Returns the folder and the spec of the run that this one starts from."""
    there = os.path.exists(os.path.join(str(spec.base), "spec.json"))
    require(there, "base", spec.base, "must be the folder of a finished run")
    folder = Path(os.path.realpath(str(spec.base)))
    return folder, read_spec(folder, folder.name)


def _final_checkpoint(spec: RunSpec, folder: Path) -> Path:
    """Returns the checkpoint after the last step. Raises InputError where the run has none."""
    record = read_record(folder, spec.run_id)
    if record is None:
        accepted = "the run has not finished; its weights can be read when it has a result.json"
        raise InputError(str(folder), "unfinished", accepted)
    accepted = f"the run has no final weights: it diverged at step {record.diverged_step}"
    require(record.status == "finished", str(folder), record.status, accepted)
    return folder / "checkpoints" / str(record.steps)


def _require_whole(checkpoint: Path) -> None:
    """Raises InputError where a final checkpoint is damaged or missing."""
    remedy = (
        "holds the run's final weights, for which no earlier checkpoint can stand: put it back, or "
        "delete the run's result.json, and the same `modjax sweep` or `train` makes it again"
    )
    if damage := find_damage(checkpoint):
        raise damaged(checkpoint, remedy, damage)
