"""A fixture for programs that run a few times: optimising them takes longer than running them."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
