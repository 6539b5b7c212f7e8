"""Flax NNX modules and the pure functions under them."""

from modjax.nn.attention import Attention, causal_attention
from modjax.nn.layers import MLP, RMSNorm
from modjax.nn.mod import MoDBlock, StochasticMoDBlock, routing_statistics
from modjax.nn.routing import (
    Selection,
    expert_choice,
    gather,
    scatter_add,
    stochastic,
    threshold,
)
from modjax.nn.transformer import Context, DenseBlock, Transformer

__all__ = [
    "MLP",
    "Attention",
    "Context",
    "DenseBlock",
    "MoDBlock",
    "RMSNorm",
    "Selection",
    "StochasticMoDBlock",
    "Transformer",
    "causal_attention",
    "expert_choice",
    "gather",
    "routing_statistics",
    "scatter_add",
    "stochastic",
    "threshold",
]
