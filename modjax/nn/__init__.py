"""Flax NNX modules and the pure functions under them."""

from modjax.nn.attention import Attention, causal_attention
from modjax.nn.block import Context, DenseBlock
from modjax.nn.layers import MLP, RMSNorm
from modjax.nn.mod import MoDBlock
from modjax.nn.routers import (
    AttentionReceived,
    ExpertChoice,
    LearnedPosition,
    Positional,
    Stochastic,
    Threshold,
    TokenChoice,
)
from modjax.nn.routing import (
    Selection,
    evenly_spread,
    gather,
    scatter_add,
)
from modjax.nn.statistics import decision_counts, decision_quality, routing_statistics
from modjax.nn.transformer import Cache, Transformer, unstack
from modjax.nn.updates import routing_losses, update_thresholds

__all__ = [
    "MLP",
    "Attention",
    "AttentionReceived",
    "Cache",
    "Context",
    "DenseBlock",
    "ExpertChoice",
    "LearnedPosition",
    "MoDBlock",
    "Positional",
    "RMSNorm",
    "Selection",
    "Stochastic",
    "Threshold",
    "TokenChoice",
    "Transformer",
    "causal_attention",
    "decision_counts",
    "decision_quality",
    "evenly_spread",
    "gather",
    "routing_losses",
    "routing_statistics",
    "scatter_add",
    "unstack",
    "update_thresholds",
]
