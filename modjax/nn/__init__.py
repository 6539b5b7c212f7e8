"""The layers as Flax NNX modules, one for each spec, and the functions that they call."""

from modjax import specs
from modjax.nn.build import MODULES, LayerModule, build, register
from modjax.nn.cache import LayerCache
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers import attention, dense, ends, mod, moe, sequence, skip, streams
from modjax.nn.layers.block import MoDBlock, RoutedBlock
from modjax.nn.layers.ends import in_chunks
from modjax.nn.lm import Cache, Transformer, unstack
from modjax.nn.params import make_param, measured, normal_param
from modjax.nn.records import Inside, Record, TokenLoss, losses, observe, statistics, totals
from modjax.nn.routing import expert_rules, routers, rules, skipping
from modjax.nn.routing.routing_records import Routed
from modjax.nn.routing.within import within
from modjax.nn.weights import named_weights, write_weights

MODULES.update({specs.Tokens: ends.Tokens, specs.Logits: ends.Logits, specs.Tied: ends.Logits})
MODULES.update({specs.Attention: attention.Attention, specs.MLP: dense.MLP, specs.Seq: dense.Seq})
MODULES.update({specs.MoD: mod.MoD, specs.MoE: moe.MoE})
MODULES.update({specs.Skip: skip.Skip, specs.Zero: skipping.Zero, specs.Centred: skipping.Centred})
MODULES.update({specs.MindSkip: skipping.MindSkip, specs.Quantile: skipping.Quantile})
MODULES.update({specs.Linear: routers.Linear, specs.Sinusoids: routers.Sinusoids})
MODULES.update({specs.Received: routers.Received})
MODULES.update({specs.TopK: rules.TopK, specs.Random: rules.Random})
MODULES.update({specs.Positional: rules.Positional, specs.Threshold: rules.Threshold})
MODULES.update({specs.Binary: rules.Binary, specs.Predictor: rules.Predictor})
MODULES.update({specs.TokenChoice: expert_rules.TokenChoice})
MODULES.update({specs.ExpertChoice: expert_rules.ExpertChoice})
MODULES.update({specs.ExpertThreshold: expert_rules.ExpertThreshold})
MODULES.update({specs.Recycled: streams.Recycled, specs.Full: streams.Full})
MODULES.update({specs.Projected: streams.Projected, specs.AltUp: streams.AltUp})
MODULES.update({specs.SimplifiedAltUp: streams.SimplifiedAltUp})
MODULES.update({specs.HyperConnection: streams.HyperConnection})
MODULES.update({specs.ManifoldHyperConnection: streams.ManifoldHyperConnection})
MODULES.update({specs.Gemma3nAltUp: streams.Gemma3nAltUp})
MODULES.update({specs.SequenceAltUp: sequence.SequenceAltUp})
MODULES.update({specs.StrideSkip: sequence.StrideSkip, specs.StridePool: sequence.StridePool})
