"""The public names of modjax."""

import subprocess
import sys

import pytest

import modjax


def test_import_modjax_is_lazy_and_public_names_resolve():
    script = """
import sys, modjax
assert not {"jax", "numpy", "tensorflow"} & set(sys.modules)
for name in modjax.__all__:
    assert getattr(modjax, name) is not None, name
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = modjax.nonsense


def test_all_public_names_are_listed_and_imported_by_a_star():
    names: dict[str, object] = {}
    exec("from modjax import *", names)
    assert (
        set(names) - {"__builtins__"} == set(modjax.__all__) == set(dir(modjax)) - {"__version__"}
    )
    assert names["Transformer"] is modjax.Transformer and names["flops"].__name__ == "modjax.flops"
