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
    from modjax.specs import (
        MLP,
        AltUp,
        Attention,
        Bidirectional,
        Binary,
        Blocks,
        Causal,
        DataConfig,
        Dense,
        Execution,
        ExpertChoice,
        ExpertRule,
        ExpertThreshold,
        Full,
        Gemma3nAltUp,
        HyperConnection,
        Layer,
        Linear,
        Logits,
        ManifoldHyperConnection,
        Mask,
        MoD,
        MoDConfig,
        ModelSpec,
        MoE,
        Positional,
        Predictor,
        Prefix,
        Projected,
        Random,
        Received,
        Recycled,
        Repeat,
        Router,
        Rule,
        RunSpec,
        Seq,
        SequenceAltUp,
        SimplifiedAltUp,
        Sinusoids,
        StridePool,
        StrideSkip,
        Threshold,
        Tied,
        TokenChoice,
        Tokens,
        TopK,
        TrainConfig,
        Window,
    )

__version__ = "0.1.0"
_FROM = {  # all others: modjax.specs
    "modjax.errors": ("InputError",),
    "modjax.nn": ("MoDBlock", "Transformer", "observe", "register", "unstack"),
    "modjax.decoding.generate": ("Sampling", "extend", "generate", "resume"),
    "modjax.finished.runs": ("load",),
}
__all__ = [
    "MLP",
    "AltUp",
    "Attention",
    "Bidirectional",
    "Binary",
    "Blocks",
    "Causal",
    "DataConfig",
    "Dense",
    "Execution",
    "ExpertChoice",
    "ExpertRule",
    "ExpertThreshold",
    "Full",
    "Gemma3nAltUp",
    "HyperConnection",
    "InputError",
    "Layer",
    "Linear",
    "Logits",
    "ManifoldHyperConnection",
    "Mask",
    "MoD",
    "MoDBlock",
    "MoDConfig",
    "MoE",
    "ModelSpec",
    "Positional",
    "Predictor",
    "Prefix",
    "Projected",
    "Random",
    "Received",
    "Recycled",
    "Repeat",
    "Router",
    "Rule",
    "RunSpec",
    "Sampling",
    "Seq",
    "SequenceAltUp",
    "SimplifiedAltUp",
    "Sinusoids",
    "StridePool",
    "StrideSkip",
    "Threshold",
    "Tied",
    "TokenChoice",
    "Tokens",
    "TopK",
    "TrainConfig",
    "Transformer",
    "Window",
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
    module = next(others, "modjax.specs")
    if module not in ("modjax.errors", "modjax.specs"):  # those need no other package
        importlib.import_module("modjax.packages").check_packages()
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
