"""The platform that a program is compiled for."""

import jax


def target() -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the mesh that is set, or else of the process.

    A host without TPUs may compile for them. Only the mesh tells the platform then.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
