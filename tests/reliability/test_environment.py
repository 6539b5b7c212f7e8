"""The environment of a sweep changes no number of its runs."""

import pytest

from tests.reliability.small import assert_same_bytes, files, finish

pytestmark = pytest.mark.slow

HOSTILE = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_RANDOM_SEED_OFFSET": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def test_no_variable_of_jax_changes_a_byte_of_the_results(sweep, undisturbed, tmp_path, count):
    finish(sweep(tmp_path / "work", **HOSTILE))
    count(
        "arrays that variables of jax left as they are",
        assert_same_bytes(tmp_path / "work", undisturbed),
    )
    kept = [files(folder, "provenance.json") for folder in (tmp_path / "work", undisturbed)]
    assert kept[0] == kept[1] and len(kept[0]) == 4


def test_flags_that_cannot_be_set_back_are_not_mixed(sweep, undisturbed, tmp_path):
    finish(sweep(tmp_path / "work"))
    process = sweep(tmp_path / "work", XLA_FLAGS="--xla_cpu_enable_fast_math=true")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "had other values of XLA_FLAGS (4 runs)" in err and err.count("\n") == 1
    finish(sweep(tmp_path / "work", "--other-code", XLA_FLAGS="--xla_cpu_enable_fast_math=true"))
