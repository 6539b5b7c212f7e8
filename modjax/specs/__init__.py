"""Specs of models and runs: frozen dataclasses in pure Python, without jax."""

from modjax.specs.fields import Spec, canonical, from_dict, to_dict
from modjax.specs.layer import Cost, Layer, Load, Repeat, Router, Shape, named
from modjax.specs.layers.attention import Attention
from modjax.specs.layers.dense import MLP, Dense, Seq
from modjax.specs.layers.ends import Embedding, Expansion, Head, Logits, Tied, Tokens
from modjax.specs.layers.mod import MoD, MoDConfig, cache_slots, selected_tokens
from modjax.specs.layers.moe import ExpertChoice, ExpertRule, ExpertThreshold, MoE, TokenChoice
from modjax.specs.layers.routers import (
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
from modjax.specs.layers.sequence import Anchored, SequenceAltUp, StridePool, StrideSkip
from modjax.specs.layers.skip import (
    Centred,
    First,
    MindSkip,
    Pool,
    Prompt,
    Quantile,
    RunningMean,
    Skip,
    SkipRule,
    Zero,
)
from modjax.specs.layers.streams import (
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
from modjax.specs.masks import Bidirectional, Blocks, Causal, Mask, Prefix, Window
from modjax.specs.model import ModelSpec
from modjax.specs.rope import ByWavelength, Divided, Interpolated, Rope, Scaling, Yarn
from modjax.specs.run import DataConfig, Execution, RunSpec, TrainConfig
