"""How layers are computed: Flax NNX modules, one for each spec, and pure functions under them."""

from modjax import spec
from modjax.nn import (
    attention,
    ends,
    expert_rules,
    layers,
    mod,
    moe,
    rules,
    sequence,
    streams,
)
from modjax.nn.block import MoDBlock, RoutedBlock
from modjax.nn.build import MODULES, LayerModule, build, register
from modjax.nn.call import At, Call, Out, under
from modjax.nn.ends import in_chunks
from modjax.nn.lm import Cache, Transformer, unstack
from modjax.nn.params import make_param, measured, normal_param
from modjax.nn.records import Inside, Record, TokenLoss, losses, observe, statistics, totals
from modjax.nn.routed import Routed
from modjax.nn.weights import named_weights, write_weights
from modjax.nn.within import within

MODULES.update({spec.Tokens: ends.Tokens, spec.Logits: ends.Logits, spec.Tied: ends.Logits})
MODULES.update({spec.Attention: attention.Attention, spec.MLP: layers.MLP, spec.Seq: layers.Seq})
MODULES.update({spec.MoD: mod.MoD, spec.MoE: moe.MoE})
MODULES.update({spec.Linear: rules.Linear, spec.Sinusoids: rules.Sinusoids})
MODULES.update({spec.Received: rules.Received, spec.TopK: rules.TopK, spec.Random: rules.Random})
MODULES.update({spec.Positional: rules.Positional, spec.Threshold: rules.Threshold})
MODULES.update({spec.Binary: rules.Binary, spec.Predictor: rules.Predictor})
MODULES.update({spec.TokenChoice: expert_rules.TokenChoice})
MODULES.update({spec.ExpertChoice: expert_rules.ExpertChoice})
MODULES.update({spec.ExpertThreshold: expert_rules.ExpertThreshold})
MODULES.update({spec.Recycled: streams.Recycled, spec.Full: streams.Full})
MODULES.update({spec.Projected: streams.Projected, spec.AltUp: streams.AltUp})
MODULES.update({spec.SimplifiedAltUp: streams.SimplifiedAltUp})
MODULES.update({spec.HyperConnection: streams.HyperConnection})
MODULES.update({spec.ManifoldHyperConnection: streams.ManifoldHyperConnection})
MODULES.update({spec.Gemma3nAltUp: streams.Gemma3nAltUp})
MODULES.update({spec.SequenceAltUp: sequence.SequenceAltUp})
MODULES.update({spec.StrideSkip: sequence.StrideSkip, spec.StridePool: sequence.StridePool})
