"""The platform that a program is compiled for."""

import jax


def target() -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the mesh that is set, or else of the process.

    Programs are compiled for TPUs on hosts that have none: there only the mesh knows.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
