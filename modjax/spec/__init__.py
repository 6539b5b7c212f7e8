"""Specs of models and runs: frozen values in pure Python, without jax."""

from modjax.spec.ends import Embedding, Expansion, Head, Logits, Tied, Tokens
from modjax.spec.fields import Spec, canonical, from_dict, to_dict
from modjax.spec.layer import Cost, Layer, Load, Repeat, Router, Shape, named
from modjax.spec.layers import MLP, Attention, Dense, Seq
from modjax.spec.masks import Bidirectional, Blocks, Causal, Mask, Prefix, Window
from modjax.spec.mod import MoD, MoDConfig, cache_slots, selected_tokens
from modjax.spec.model import ModelSpec
from modjax.spec.moe import ExpertChoice, ExpertRule, ExpertThreshold, MoE, TokenChoice
from modjax.spec.routers import (
    Binary,
    Linear,
    Positional,
    Predictor,
    Random,
    Received,
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
