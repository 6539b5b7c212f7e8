"""How layers are computed: Flax NNX modules, one for each spec, and pure functions under them."""

from modjax.nn import layers, mod, moe, sequence, streams
from modjax.nn.block import MoDBlock
from modjax.nn.build import MODULES, build, register
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers import empty
from modjax.nn.lm import Cache, Transformer, unstack
from modjax.nn.params import make_param, measured, normal_param
from modjax.nn.records import Inside, Record, losses, observe, statistics
from modjax.nn.routed import Routed, decision_counts, decision_quality
from modjax.spec import MLP, Attention, MoD, MoE, Seq
from modjax.spec.sequence import SequenceAltUp, StridePool, StrideSkip
from modjax.spec.streams import (
    AltUp,
    Full,
    Gemma3nAltUp,
    HyperConnection,
    Projected,
    Recycled,
    SimplifiedAltUp,
)

MODULES.update({Attention: layers.Attention, MLP: layers.MLP, Seq: layers.Seq})
MODULES.update({MoD: mod.MoD, MoE: moe.MoE})
MODULES.update({Recycled: streams.Recycled, Full: streams.Full, Projected: streams.Projected})
MODULES.update({AltUp: streams.AltUp, SimplifiedAltUp: streams.SimplifiedAltUp})
MODULES.update({HyperConnection: streams.HyperConnection, Gemma3nAltUp: streams.Gemma3nAltUp})
MODULES.update({SequenceAltUp: sequence.SequenceAltUp, StrideSkip: sequence.StrideSkip})
MODULES.update({StridePool: sequence.StridePool})

__all__ = [
    "At",
    "Cache",
    "Call",
    "Inside",
    "MoDBlock",
    "Out",
    "Record",
    "Routed",
    "Transformer",
    "build",
    "decision_counts",
    "decision_quality",
    "empty",
    "losses",
    "make_param",
    "measured",
    "normal_param",
    "observe",
    "register",
    "statistics",
    "under",
    "unstack",
]
