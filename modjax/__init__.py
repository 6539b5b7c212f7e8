"""Conditional computation in transformers, measured by isoFLOP sweeps.

Public names are imported when they are first asked for: `import modjax` itself costs nothing, and
never imports TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modjax import flops
    from modjax.decoding.generate import Sampling, extend, generate, resume
    from modjax.errors import InputError
    from modjax.finished.runs import load
    from modjax.nn import MoDBlock, Transformer, register, unstack
    from modjax.spec import (
        MLP,
        Attention,
        DataConfig,
        Dense,
        Execution,
        Layer,
        MoD,
        MoDConfig,
        ModelSpec,
        MoE,
        Repeat,
        RunSpec,
        Seq,
        TrainConfig,
    )

__version__ = "0.1.0"
_FROM = {
    "modjax.errors": ("InputError",),
    "modjax.spec": (
        "MLP",
        "Attention",
        "DataConfig",
        "Dense",
        "Execution",
        "Layer",
        "MoD",
        "MoDConfig",
        "MoE",
        "ModelSpec",
        "Repeat",
        "RunSpec",
        "Seq",
        "TrainConfig",
    ),
    "modjax.nn": ("MoDBlock", "Transformer", "register", "unstack"),
    "modjax.decoding.generate": ("Sampling", "extend", "generate", "resume"),
    "modjax.finished.runs": ("load",),
}
__all__ = [
    "MLP",
    "Attention",
    "DataConfig",
    "Dense",
    "Execution",
    "InputError",
    "Layer",
    "MoD",
    "MoDBlock",
    "MoDConfig",
    "MoE",
    "ModelSpec",
    "Repeat",
    "RunSpec",
    "Sampling",
    "Seq",
    "TrainConfig",
    "Transformer",
    "extend",
    "flops",
    "generate",
    "load",
    "register",
    "resume",
    "unstack",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'modjax' has no attribute {name!r}")
    if name == "flops":
        return importlib.import_module("modjax.flops")
    module = next(module for module, names in _FROM.items() if name in names)
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
