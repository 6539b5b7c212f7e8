"""Conditional computation in transformers, measured by isoFLOP sweeps.

Public names are imported when they are first asked for: `import modjax` itself costs nothing, and
never imports TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modjax import flops
    from modjax.config import (
        DataConfig,
        Execution,
        InputError,
        MoDConfig,
        ModelConfig,
        RunSpec,
        TrainConfig,
    )
    from modjax.decoding.generate import Sampling, extend, generate, resume
    from modjax.nn import DenseBlock, MoDBlock, Transformer, unstack

__version__ = "0.1.0"
__all__ = [
    "DataConfig",
    "DenseBlock",
    "Execution",
    "InputError",
    "MoDBlock",
    "MoDConfig",
    "ModelConfig",
    "RunSpec",
    "Sampling",
    "TrainConfig",
    "Transformer",
    "extend",
    "flops",
    "generate",
    "resume",
    "unstack",
]
_FROM = {
    "modjax.nn": ("DenseBlock", "MoDBlock", "Transformer", "unstack"),
    "modjax.decoding.generate": ("Sampling", "extend", "generate", "resume"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'modjax' has no attribute {name!r}")
    if name == "flops":
        return importlib.import_module("modjax.flops")
    module = next((module for module, names in _FROM.items() if name in names), "modjax.config")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
