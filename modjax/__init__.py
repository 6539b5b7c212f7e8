"""Conditional computation in transformers, measured by isoFLOP sweeps.

The first use of a public name imports its module: `import modjax` itself imports no other package.
"""

import importlib
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401, F403
if TYPE_CHECKING:
    from modjax import flops
    from modjax.decoding.generate import *
    from modjax.errors import *
    from modjax.finished.runs import *
    from modjax.nn import *
    from modjax.pretrained import *
    from modjax.specs import *

__version__ = "0.1.0"
_NAMES = {
    "modjax.flops": "flops",
    "modjax.errors": "InputError",
    "modjax.specs": """
        AltUp Attention Bidirectional Binary Blocks ByWavelength Causal Centred DataConfig Dense
        Divided Execution ExpertChoice ExpertRule ExpertThreshold First Full Gemma3nAltUp
        HyperConnection Interpolated Layer Linear Logits MLP ManifoldHyperConnection Mask MindSkip
        MoD MoDConfig MoE ModelSpec Positional Predictor Prefix Projected Prompt Quantile Random
        Received Recycled Repeat Rope Router Rule RunSpec RunningMean Seq SequenceAltUp
        SimplifiedAltUp Sinusoids Skip StridePool StrideSkip Threshold Tied TokenChoice Tokens TopK
        TrainConfig Window Yarn Zero""",
    "modjax.nn": "MoDBlock Transformer observe register unstack",
    "modjax.decoding.generate": "Sampling extend generate resume",
    "modjax.finished.runs": "load",
    "modjax.pretrained": "from_pretrained save_pretrained",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
if not TYPE_CHECKING:  # a type checker cannot read a computed list
    __all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'modjax' has no attribute {name!r}")
    module = _MODULES[name]
    if module not in ("modjax.errors", "modjax.flops", "modjax.specs"):  # they need no package
        importlib.import_module("modjax.packages").check_packages()
    found = importlib.import_module(module)
    return found if name == "flops" else getattr(found, name)


def __dir__() -> list[str]:
    return [*_MODULES, "__version__"]
