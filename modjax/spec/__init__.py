"""What a model and a run are: frozen values, pure Python without jax."""

from modjax.spec.ends import Embedding, Expansion, Head, Logits, Tied, Tokens
from modjax.spec.fields import canonical, from_dict, to_dict
from modjax.spec.layer import ROUTINGS, Cost, Layer, Load, Repeat, Shape, Spec, named
from modjax.spec.layers import MLP, Attention, Dense, Seq
from modjax.spec.mod import MoD, MoDConfig, cache_slots, selected_tokens
from modjax.spec.model import ModelSpec
from modjax.spec.moe import MoE
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
    "ROUTINGS",
    "SINKHORN_ROUNDS",
    "AltUp",
    "Anchored",
    "Attention",
    "Cost",
    "DataConfig",
    "Dense",
    "Embedding",
    "Execution",
    "Expansion",
    "Full",
    "Gemma3nAltUp",
    "Head",
    "HyperConnection",
    "Layer",
    "Load",
    "Logits",
    "ManifoldHyperConnection",
    "MoD",
    "MoDConfig",
    "MoE",
    "ModelSpec",
    "Projected",
    "Recycled",
    "Repeat",
    "RunSpec",
    "Seq",
    "SequenceAltUp",
    "Shape",
    "SimplifiedAltUp",
    "Spec",
    "Streams",
    "StridePool",
    "StrideSkip",
    "Tied",
    "Tokens",
    "TrainConfig",
    "cache_slots",
    "canonical",
    "from_dict",
    "named",
    "selected_tokens",
    "to_dict",
]
