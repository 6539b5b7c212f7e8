"""Expensive operations, implemented to suit the platform."""

from modjax.kernels.attention import Scoring, Side, attend, received_attention
from modjax.kernels.grouped import grouped_matmul
from modjax.kernels.matmul import product, project, project_back
from modjax.kernels.target import target
