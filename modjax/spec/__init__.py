"""What a model and a run are: frozen values, pure Python without jax."""

from modjax.spec.fields import canonical, from_dict, to_dict
from modjax.spec.layer import ROUTINGS, Cost, Layer, Load, Repeat, Shape, named
from modjax.spec.layers import MLP, Attention, Dense, Seq
from modjax.spec.mod import MoD, MoDConfig, cache_slots, selected_tokens
from modjax.spec.model import ModelSpec
from modjax.spec.moe import MoE
from modjax.spec.run import DataConfig, Execution, RunSpec, TrainConfig

__all__ = [
    "MLP",
    "ROUTINGS",
    "Attention",
    "Cost",
    "DataConfig",
    "Dense",
    "Execution",
    "Layer",
    "Load",
    "MoD",
    "MoDConfig",
    "MoE",
    "ModelSpec",
    "Repeat",
    "RunSpec",
    "Seq",
    "Shape",
    "TrainConfig",
    "cache_slots",
    "canonical",
    "from_dict",
    "named",
    "selected_tokens",
    "to_dict",
]
