"""Functions compiled for described TPUs, which need not be there. Skips without the compiler."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modjax.kernels.chips import described_devices


def compiled_on(topology: str, function: Callable, *shapes: Any) -> Any:
    """Returns the function compiled for arrays in bfloat16.

    shapes: dims of each argument, and the dim that is split over all devices, or None.
    """
    pytest.importorskip("libtpu", reason="holds the TPU compiler: pip install 'modjax[aot]'")
    mesh = Mesh(np.array(described_devices(topology)), ("all",))
    arrays = []
    for dims, split in shapes:
        spec = PartitionSpec(*("all" if dim == split else None for dim in range(len(dims))))
        sharding = NamedSharding(mesh, spec)
        arrays.append(jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=sharding))
    return jax.jit(function).lower(*arrays).compile()
