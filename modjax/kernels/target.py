"""The platform that a program is compiled for."""

from typing import Any

import jax


def target() -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the mesh that is set, or else of the process.

    A host without TPUs may compile for them. Only the mesh tells the platform then.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def slice_of(device: Any) -> int:
    """Returns the number of a device's TPU slice; 0 on other platforms, which number hosts so."""
    return device.slice_index if device.platform == "tpu" and hasattr(device, "slice_index") else 0
