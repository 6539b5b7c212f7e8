"""What a model and a run are: frozen values, pure Python without jax."""

from modjax.spec.experts import ExpertChoice, ExpertRule, ExpertThreshold, TokenChoice
from modjax.spec.fields import canonical, from_dict, to_dict
from modjax.spec.layer import Cost, Layer, Load, Repeat, Shape, Spec, named
from modjax.spec.layers import MLP, Attention, Dense, Seq
from modjax.spec.masks import Bidirectional, Blocks, Causal, Mask, Prefix, Window
from modjax.spec.mod import MoD, MoDConfig, cache_slots, selected_tokens
from modjax.spec.model import ModelSpec
from modjax.spec.moe import MoE
from modjax.spec.routers import (
    Binary,
    Linear,
    Positional,
    Predictor,
    Random,
    Received,
    Router,
    Rule,
    Sinusoids,
    Threshold,
    TopK,
)
from modjax.spec.run import DataConfig, Execution, RunSpec, TrainConfig
from modjax.spec.sequence import Anchored, SequenceAltUp, StridePool, StrideSkip
from modjax.spec.streams import (
    SINKHORN_ROUNDS,
    AltUp,
    Full,
    Gemma3nAltUp,
    HyperConnection,
    ManifoldHyperConnection,
    Projected,
    Recycled,
    SimplifiedAltUp,
    Streams,
)

__all__ = [
    "MLP",
    "SINKHORN_ROUNDS",
    "AltUp",
    "Anchored",
    "Attention",
    "Bidirectional",
    "Binary",
    "Blocks",
    "Causal",
    "Cost",
    "DataConfig",
    "Dense",
    "Execution",
    "ExpertChoice",
    "ExpertRule",
    "ExpertThreshold",
    "Full",
    "Gemma3nAltUp",
    "HyperConnection",
    "Layer",
    "Linear",
    "Load",
    "ManifoldHyperConnection",
    "Mask",
    "MoD",
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
    "Seq",
    "SequenceAltUp",
    "Shape",
    "SimplifiedAltUp",
    "Sinusoids",
    "Spec",
    "Streams",
    "StridePool",
    "StrideSkip",
    "Threshold",
    "TokenChoice",
    "TopK",
    "TrainConfig",
    "Window",
    "cache_slots",
    "canonical",
    "from_dict",
    "named",
    "selected_tokens",
    "to_dict",
]
