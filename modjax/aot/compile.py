"""Compiling the real train step, or the real loop of sampling, for devices that are not there."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax.decoding.generate import Reading, draw_loop, first_state, read_first
from modjax.decoding.sampling import PLAIN
from modjax.errors import require
from modjax.kernels.chips import GIB, Chip, chip_of, described_devices, memory_lacked
from modjax.nn import unstack
from modjax.sharding import batch_shards, partition_spec
from modjax.specs import Execution, RunSpec, TrainConfig
from modjax.training.fitting import DoesNotFit, fitted
from modjax.training.mesh import check_batch, make_mesh
from modjax.training.programs import abstract_batch, lower_train_step
from modjax.training.state import (
    Model,
    abstract_model,
    abstract_state,
    abstract_weights,
    joined,
    struct,
)

DRAWN = 32  # tokens of one call of the loop, as `modjax sample` streams them


class Compiled(NamedTuple):
    """A program compiled for devices that need not be there.

    what: the program, in words.
    remat: of the train step, chosen if it was "auto"; empty for another program.
    inputs: name of a group of inputs -> its arrays, without their values.
    executable: as `jax.stages.Lowered.compile` returns it.
    seconds: time that the compiler took.
    """

    what: str
    spec: RunSpec
    topology: str
    slices: int
    mesh: Mesh
    remat: str
    chip: Chip
    inputs: dict[str, Any]
    executable: Any
    seconds: float


def mesh_for(spec: RunSpec, execution: Execution, topology: str, slices: int = 1) -> Mesh:
    """Returns the mesh of a run on a topology. Raises the InputErrors of `compile_step`."""
    devices = described_devices(topology, slices)
    size, count = execution.data * execution.tensor * execution.expert, len(devices)
    accepted = f"must be 0, or make the mesh as large as the topology, {count} chips"
    fits = count == size * execution.fsdp if execution.fsdp else count % max(1, size) == 0
    require(execution.data == 0 or fits, "execution.data", execution.data, accepted)
    mesh = make_mesh(execution, devices)
    check_batch(mesh, spec.train)
    abstract_weights(mesh, abstract_model(spec.model, spec.train.trained))
    return mesh


def compile_step(
    spec: RunSpec,
    execution: Execution,
    topology: str,
    slices: int = 1,
    *,
    decode: bool = False,
) -> Compiled:
    """Returns a run's train step, compiled for a topology, see modjax.kernels.chips.

    decode: instead, the loop of sampling that draws DRAWN tokens after each sequence of the batch.
    An open fsdp and remat of the train step are chosen as in a run, see training/fitting.py.
    Raises InputError for an unknown topology, without the compiler, and for a mesh that does not
    suit the topology or the run; DoesNotFit if the compiler finds no room for the program.
    """
    mesh, began = mesh_for(spec, execution, topology, slices), time.monotonic()
    lowered: Any = None
    chip, executable = chip_of(mesh.devices.flat[0]), None
    if not decode:
        model = abstract_model(spec.model, spec.train.trained)
        devices = described_devices(topology, slices)
        chosen = fitted(model, spec.train, execution, devices, chip.memory)
        mesh, execution, executable = chosen.mesh, chosen.execution, chosen.step
        inputs = _train_inputs(mesh, model, spec.train)
        if executable is None:
            lowered = lower_train_step(mesh, model, spec.train, execution)
    else:
        lowered, inputs = _lower_decode(mesh, spec)
    if executable is None:
        began = time.monotonic()
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = memory_lacked(error)
            if needed is None:
                raise
            raise too_large(topology, "temporaries take", needed, chip) from error
    seconds = time.monotonic() - began
    what = f"decoding of {DRAWN} tokens" if decode else "train step"
    remat = "" if decode else execution.remat
    return Compiled(what, spec, topology, slices, mesh, remat, chip, inputs, executable, seconds)


def too_large(topology: str, what: str, needed: int, chip: Chip) -> DoesNotFit:
    """Returns the error for a program that needs these bytes."""
    accepted = (
        f"does not fit: {what} {needed / GIB:.2f} GiB of {chip.memory / GIB:.2f} per chip: "
        "raise execution.fsdp, store less by execution.remat, or choose a larger topology"
    )
    error = DoesNotFit("--topology", topology, accepted)
    error.needed = needed
    return error


def _train_inputs(mesh: Mesh, model: Model, train: TrainConfig) -> dict[str, Any]:
    state = abstract_state(mesh, model, train)
    return {
        "parameters": (state.params, state.frozen, state.measured),
        "moments of the optimizer": state.opt_state,
        "batch": abstract_batch(mesh, train.batch_size, train.seq_len),
    }


def _lower_decode(mesh: Mesh, spec: RunSpec) -> tuple[Any, dict[str, Any]]:
    """Lowers the loop after a prompt that leaves room for DRAWN tokens in a sequence."""
    model, batch, length = abstract_model(spec.model), spec.train.batch_size, spec.train.seq_len
    weights = joined(*abstract_weights(mesh, model))
    graphdef: Any = None

    def apart(weights: Any) -> Any:
        nonlocal graphdef
        graphdef, unstacked = unstack(model.graphdef, weights)
        return unstacked

    def start(weights: Any, tokens_BL: Any, lengths_B: Any, key: Any) -> Any:
        reading = Reading(length, "causal", None)
        logits_BV, cache, _ = read_first(graphdef, weights, tokens_BL, lengths_B, key, reading)
        return first_state(logits_BV, cache, key, reading, ())

    with jax.set_mesh(mesh):
        placed = jax.jit(apart).lower(weights).compile().output_shardings
        weights = jax.tree.map(struct, jax.eval_shape(apart, weights), placed)
        prompt_BL = jax.ShapeDtypeStruct((batch, max(1, length - DRAWN)), jnp.int32)
        lengths_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(start, weights, prompt_BL, lengths_B, key)
        state = jax.tree_util.tree_map_with_path(lambda at, x: _placed(mesh, batch, at, x), state)
        lowered = draw_loop.lower(graphdef, weights, state, DRAWN, PLAIN)
    return lowered, {"parameters": weights, "caches": state.cache, "logits": state.logits_BV}


def _placed(mesh: Mesh, batch: int, path: Any, leaf: Any) -> Any:
    """Returns an array of the decoding state with a sharding, by the dims that its name tells."""
    dims = str(path[-1]).rpartition("_")[2] if leaf.ndim else ""
    logical = {"B": "batch" if batch_shards(batch) > 1 else None, "G": "kv_heads"}
    known = len(dims) == leaf.ndim and dims.startswith("B")
    spec = partition_spec([logical.get(dim) for dim in dims]) if known else PartitionSpec()
    return struct(leaf, NamedSharding(mesh, spec))
