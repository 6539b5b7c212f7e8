"""How layers are computed: Flax NNX modules, one for each spec, and pure functions under them."""

from modjax.nn import layers, mod, moe
from modjax.nn.block import MoDBlock
from modjax.nn.build import MODULES, build, register
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers import empty
from modjax.nn.lm import Cache, Transformer, unstack
from modjax.nn.params import make_param, measured, normal_param
from modjax.nn.records import Inside, Record, losses, observe, statistics
from modjax.nn.routed import Routed, decision_counts, decision_quality
from modjax.spec import MLP, Attention, MoD, MoE, Seq

MODULES.update({Attention: layers.Attention, MLP: layers.MLP, Seq: layers.Seq})
MODULES.update({MoD: mod.MoD, MoE: moe.MoE})

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
