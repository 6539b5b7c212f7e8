"""Layers are registered once under a name; the same module may register its layers again."""

import dataclasses
import importlib

import pytest
from flax import nnx

import modjax
from modjax.errors import InputError
from modjax.nn import MODULES, Out
from modjax.nn.layers import mod
from modjax.specs import MoD
from modjax.specs.layer import NAMES
from tests.outside import strided

pytestmark = pytest.mark.usefixtures("own_layers")


def test_no_layer_takes_the_name_or_the_module_of_another():
    @dataclasses.dataclass(frozen=True)
    class MoDLike(modjax.Layer):
        pass

    MoDLike.__name__ = "MoD"
    for spec in (MoDLike, MoD, strided.Strided):
        with pytest.raises(
            InputError, match=r"modjax.register = '\w+': is a layer of .*\.py already"
        ):
            modjax.register(spec, mod.MoD)
    assert NAMES["MoD"] is MoD and MODULES[MoD] is mod.MoD and MoDLike not in MODULES


def test_the_module_of_a_layer_has_the_base_class():
    @dataclasses.dataclass(frozen=True)
    class Plain(modjax.Layer):
        pass

    class PlainModule(nnx.Module):
        def __call__(self, x, at, call, cache=None):
            return Out(x)

    with pytest.raises(InputError, match=r"must be a subclass of modjax\.nn\.LayerModule"):
        modjax.register(Plain, PlainModule)
    assert "Plain" not in NAMES


def test_a_module_that_is_imported_again_registers_its_layers_again():
    first = strided.Strided
    importlib.reload(strided)
    assert strided.Strided is not first
    assert NAMES["Strided"] is strided.Strided and strided.Strided in MODULES
    strided.Strided = first  # other tests hold it
