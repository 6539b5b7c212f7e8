"""Initial weights of a run: from its seed, from a finished run or from a pretrained model.

Checkpoints leave out frozen weights. Reading one recreates them and compares their fingerprint.
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
from modjax.pretrained import match_weights, open_files, read_weights
from modjax.records import read_record, read_spec
from modjax.specs import RunSpec
from modjax.training.checkpoint import read_checkpoint
from modjax.training.programs import init_state
from modjax.training.state import Model, TrainState, abstract_model, abstract_weights, joined
from modjax.training.stored import find_damage, pull_one


def initial_state(mesh: Mesh, model: Model, spec: RunSpec) -> TrainState:
    """Returns the state before the first step. Call it under `jax.set_mesh(mesh)`.

    Raises InputError if the weights of `spec.base` cannot be read.
    """
    weights = None
    if spec.base is not None and _is_run(spec):
        folder, base = _base(spec)
        _, weights = read_finished(mesh, base, folder, {"run_id": base.run_id})
    elif spec.base is not None:
        files = open_files(spec.base)
        slots, _ = match_weights(files, spec.model)
        structs = joined(*abstract_weights(mesh, model))
        weights = read_weights(files, slots, structs)
    return init_state(mesh, model, spec.train, weights)


def new_weights(spec: RunSpec) -> list[str]:
    """Returns the names of the weights that a run draws from its seed although it has a base.

    Raises InputError as `check_base` does for a pretrained model.
    """
    if spec.base is None or _is_run(spec):
        return []
    return match_weights(open_files(spec.base), spec.model)[1]


def check_base(spec: RunSpec, model: Model) -> None:
    """Raises InputError unless `spec.base` has the weights of this model.

    The base is a finished run with weights of the same shapes, or a pretrained model whose
    attentions and MLPs fit, see modjax.pretrained.match_weights.
    """
    if spec.base is None:
        return
    if not _is_run(spec):
        match_weights(open_files(spec.base), spec.model)
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
    """Returns the model of a finished run and its final weights, as one nested dict.

    Call it under `jax.set_mesh(mesh)`.
    identity: see `read_checkpoint`.
    Raises InputError if the run has not finished, or if its weights or those of its base are
    missing or have changed.
    """
    model = abstract_model(spec.model, spec.train.trained)
    check_base(spec, model)
    checkpoint = _final_checkpoint(spec, folder)
    _require_whole(checkpoint)
    frozen = initial_state(mesh, model, spec).frozen if model.weights.frozen else {}
    abstract = abstract_weights(mesh, model)
    try:
        weights, _ = read_checkpoint(checkpoint, abstract, identity | identity_of(frozen))
    except Exception:  # orbax raises many errors for files that vanish while it reads
        _require_whole(checkpoint)
        raise
    return model, joined(*weights._replace(frozen=frozen))


def identity_of(frozen: Any) -> dict[str, str]:
    """Returns the entry for frozen parameters in a checkpoint's meta data; {} if none is frozen."""
    return {"base": fingerprint(frozen)} if frozen else {}


def fingerprint(params: Any) -> str:
    """Returns a digest of parameters that does not depend on their sharding."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    listed = [(jax.tree_util.keystr(p), x.shape, str(x.dtype), int(_digits(x))) for p, x in leaves]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


@jax.jit
def _digits(leaf: jax.Array) -> jax.Array:
    """Returns a number that depends on every bit of an array and on the bit's place in it."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    places = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
    for factor in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D):
        bits = (bits ^ places) * jnp.uint32(factor)
        bits ^= bits >> jnp.uint32(15)
    return jnp.sum(bits, dtype=jnp.uint32)


def _is_run(spec: RunSpec) -> bool:
    """Returns whether the base is the folder of a run, and not a pretrained model."""
    base = str(spec.base)
    there = [os.path.exists(os.path.join(base, name)) for name in ("spec.json", "config.json")]
    accepted = "must be the folder of a finished run, or a pretrained model"
    require(any(there) or base.endswith(".gguf"), "base", base, accepted)
    return there[0]


def _base(spec: RunSpec) -> tuple[Path, RunSpec]:
    folder = Path(os.path.realpath(str(spec.base)))
    return folder, read_spec(folder, folder.name)


def _final_checkpoint(spec: RunSpec, folder: Path) -> Path:
    """Returns the folder of the last checkpoint. Raises InputError unless the run has finished."""
    record = read_record(folder, spec.run_id)
    if record is None:
        accepted = "the run has not finished; its weights can be read when it has a result.json"
        raise InputError(str(folder), "unfinished", accepted)
    accepted = f"the run has no final weights: it diverged at step {record.diverged_step}"
    require(record.status == "finished", str(folder), record.status, accepted)
    return folder / "checkpoints" / str(record.steps)


def _require_whole(checkpoint: Path) -> None:
    """Raises InputError if a final checkpoint is damaged or missing."""
    remedy = (
        "holds the run's final weights, which no earlier checkpoint can replace: put it back, or "
        "delete the run's result.json, and the same `modjax sweep` or `train` makes it again"
    )
    pull_one(checkpoint)
    if damage := find_damage(checkpoint):
        raise damaged(checkpoint, remedy, damage)
