"""The mesh and the rematerialisation of a run, chosen by the memory that its train step takes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from modjax.errors import InputError
from modjax.faults import is_out_of_memory
from modjax.specs import Execution, TrainConfig
from modjax.specs.run import KEPT
from modjax.training.mesh import check_batch, make_mesh
from modjax.training.programs import lower_train_step
from modjax.training.state import Model, abstract_state

# The least recomputation first.
REMATS = ("none", ",".join(KEPT), "queries,keys,values,context", "context", "full")


class DoesNotFit(InputError):
    """A program that needs more memory than a device has. needed: bytes, or None if unknown."""

    needed: int | None = None


class Fitted(NamedTuple):
    """The mesh and the settings of a run.

    execution: names fsdp and remat, so neither is open.
    step: compiled train step, see `lower_train_step`; None if the choice needed none.
    """

    mesh: Mesh
    execution: Execution
    step: Any = None


def fitted(
    model: Model,
    train: TrainConfig,
    execution: Execution,
    devices: Sequence[Any],
    memory: int | None,
) -> Fitted:
    """Chooses fsdp if it is 0, and remat if it is "auto".

    Takes the smallest fsdp at which the step fits with the most recomputation, and then the least
    recomputation that fits there. The compiler's own account decides: arguments, temporaries, and
    outputs that take no argument's place.

    devices: devices to use, which need not be there.
    memory: bytes that a program can use on each device. None: unknown, so nothing is compiled, and
      fsdp is 1 and remat "none".
    Raises InputError if the mesh does not suit the run, and DoesNotFit if nothing fits.
    """
    if memory is None or (execution.fsdp and execution.remat != "auto"):
        settled = execution.settled()
        return Fitted(make_mesh(settled, devices), settled)
    *less, most = REMATS if execution.remat == "auto" else (execution.remat,)
    for mesh, sized in _meshes(model, train, execution, devices, memory):
        tried = {remat: dataclasses.replace(sized, remat=remat) for remat in (*less, most)}
        last = _compiled(mesh, model, train, tried[most], memory)
        if last is None:
            continue
        for remat in less:
            if step := _compiled(mesh, model, train, tried[remat], memory):
                return Fitted(mesh, tried[remat], step)
        return Fitted(mesh, tried[most], last)
    axes = "execution.fsdp or tensor" if execution.fsdp else "execution.tensor"
    accepted = (
        f"does not fit into the {memory / 2**30:.2f} GiB of a device with execution.remat = "
        f"{most!r}: take more devices, raise {axes}, or raise train.accumulation"
    )
    raise DoesNotFit("train.batch_size", train.batch_size, accepted)


def _meshes(
    model: Model, train: TrainConfig, execution: Execution, devices: Sequence[Any], memory: int
) -> Iterator[tuple[Mesh, Execution]]:
    """Yields the meshes on which the state fits into memory, the smallest fsdp first.

    Raises InputError if not even the first suits the run.
    """
    rest = len(devices) // (execution.tensor * execution.expert * (execution.data or 1))
    sizes = [n for n in range(1, max(1, rest) + 1) if rest % n == 0]
    for fsdp in [execution.fsdp] if execution.fsdp else sizes:
        sized = dataclasses.replace(execution, fsdp=fsdp)
        try:
            mesh = make_mesh(sized, devices)
            check_batch(mesh, train)
            state = abstract_state(mesh, model, train)
        except InputError:
            if fsdp in (1, execution.fsdp):
                raise
            continue
        if sum(map(_bytes, jax.tree.leaves(state))) <= memory:
            yield mesh, sized


def _bytes(leaf: Any) -> int:
    """Returns the bytes of an array on each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _compiled(
    mesh: Mesh, model: Model, train: TrainConfig, execution: Execution, memory: int
) -> Any:
    """Returns the compiled train step, or None if a process finds that it needs more memory."""
    lowered = lower_train_step(mesh, model, train, execution)
    try:
        step = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        step = None
    fits = step is not None and _needed(step) <= memory
    if jax.process_count() > 1:  # their compilers may differ, but all must choose alike
        fits = bool(np.min(multihost_utils.process_allgather(np.int32(fits))))
    return step if fits else None


def _needed(step: Any) -> int:
    """Returns the bytes that a compiled train step takes on each device."""
    found = step.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes  # the state is donated
    return found.argument_size_in_bytes + found.temp_size_in_bytes + outputs


def device_memory() -> int | None:
    """Returns the bytes that a program can use on a device, the least of all processes.

    None if the platform sets no limit, as on CPU.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return None
    mib = np.int32(limit // 2**20)  # all processes must make the same choice
    return int(np.min(multihost_utils.process_allgather(mib))) * 2**20
