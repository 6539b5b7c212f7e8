"""Expensive operations, implemented to suit the platform."""

from modjax.kernels.attention import attend
from modjax.kernels.cross_entropy import NORMALISER, cross_entropy
from modjax.kernels.grouped import grouped_matmul
from modjax.kernels.matmul import from_heads, product, project, project_back, to_heads
from modjax.kernels.plain import received_attention
from modjax.kernels.rotary import rotate
from modjax.kernels.scoring import Scoring, Side
from modjax.kernels.slots import first_with_counts, weighted_product
from modjax.kernels.stream import constrain_stream
from modjax.kernels.target import slice_of, target
