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
    from modjax.nn import MoDBlock, Transformer, observe, register, unstack
    from modjax.spec import (
        MLP,
        AltUp,
        Attention,
        DataConfig,
        Dense,
        Execution,
        Full,
        Gemma3nAltUp,
        HyperConnection,
        Layer,
        Logits,
        ManifoldHyperConnection,
        MoD,
        MoDConfig,
        ModelSpec,
        MoE,
        Projected,
        Recycled,
        Repeat,
        RunSpec,
        Seq,
        SequenceAltUp,
        SimplifiedAltUp,
        StridePool,
        StrideSkip,
        Tied,
        Tokens,
        TrainConfig,
    )

__version__ = "0.1.0"
_FROM = {  # all others: modjax.spec
    "modjax.errors": ("InputError",),
    "modjax.nn": ("MoDBlock", "Transformer", "observe", "register", "unstack"),
    "modjax.decoding.generate": ("Sampling", "extend", "generate", "resume"),
    "modjax.finished.runs": ("load",),
}
__all__ = [
    "MLP",
    "AltUp",
    "Attention",
    "DataConfig",
    "Dense",
    "Execution",
    "Full",
    "Gemma3nAltUp",
    "HyperConnection",
    "InputError",
    "Layer",
    "Logits",
    "ManifoldHyperConnection",
    "MoD",
    "MoDBlock",
    "MoDConfig",
    "MoE",
    "ModelSpec",
    "Projected",
    "Recycled",
    "Repeat",
    "RunSpec",
    "Sampling",
    "Seq",
    "SequenceAltUp",
    "SimplifiedAltUp",
    "StridePool",
    "StrideSkip",
    "Tied",
    "Tokens",
    "TrainConfig",
    "Transformer",
    "extend",
    "flops",
    "generate",
    "load",
    "observe",
    "register",
    "resume",
    "unstack",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'modjax' has no attribute {name!r}")
    if name == "flops":
        return importlib.import_module("modjax.flops")
    others = (module for module, names in _FROM.items() if name in names)
    module = next(others, "modjax.spec")
    if module not in ("modjax.errors", "modjax.spec"):  # those need no other package
        importlib.import_module("modjax.packages").check_packages()
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
