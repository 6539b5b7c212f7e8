"""Residual streams: their expansions, and layers that read one vector from them and write to all.

Legend: B batch, L positions, S residual streams, D model width. B and L may be 1 in a weight. A
product with a weight (B, L, S, S) sums over its last dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.kernels import product
from modjax.nn.build import LayerModule, build
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers.dense import RMSNorm, Sublayer, mean_square, unit_rms
from modjax.nn.params import make_param, normal_param, read
from modjax.nn.routing.routers import linear

LEAST_SQUARE = 1e-5  # least mean square that a stream is divided by, as in Gemma 3n
DYNAMIC_SCALE = 0.01  # initial scale of what hyper-connections compute from their input
LEAST_SHARE = 1e-6  # added to each weight so that no column is 0, as in DeepSeek V4
NEAR = 0.9  # initial weight of a stream in itself, in mHC


class Recycled(nnx.Module):
    """Copies of the embedding in all streams, averaged at the end."""

    def __init__(self, spec: specs.Recycled, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.streams = spec.streams

    def open(self, x_BLD: jax.Array) -> jax.Array:
        return jnp.repeat(x_BLD[:, :, None], self.streams, axis=2)

    def close(self, x_BLSD: jax.Array) -> jax.Array:
        return jnp.mean(x_BLSD, axis=2)  # taken in float32, whatever its dtype


class Full(nnx.Module):
    """Streams split from a wide embedding, joined to wide features at the end."""

    def __init__(self, spec: specs.Full, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.streams = spec.streams

    def open(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD.reshape(*x_BLD.shape[:2], self.streams, -1)

    def close(self, x_BLSD: jax.Array) -> jax.Array:
        return x_BLSD.reshape(*x_BLSD.shape[:2], -1)


class Projected(nnx.Module):
    """Learned projections to the streams and back, each scaled to the RMS of the first stream."""

    def __init__(self, spec: specs.Projected, shape: specs.Shape, *, rngs: nnx.Rngs):
        d, axes = shape.d_model, (None, "embed", None)
        size, std = (spec.streams - 1, d, d), 1 / math.sqrt(d)
        self.w_open = normal_param(rngs, size, axes, std=std)
        self.w_close = normal_param(rngs, size, axes, std=std)

    def open(self, x_BLD: jax.Array) -> jax.Array:
        others = [_sized(product(x_BLD, w_DD), x_BLD) for w_DD in read(self.w_open, x_BLD.dtype)]
        return jnp.stack([x_BLD, *others], axis=2)

    def close(self, x_BLSD: jax.Array) -> jax.Array:
        first_BLD = x_BLSD[:, :, 0]
        others = [
            _sized(product(x_BLSD[:, :, s], w_DD), first_BLD)
            for s, w_DD in enumerate(read(self.w_close, x_BLSD.dtype), 1)
        ]
        return sum(others, first_BLD) / (len(others) + 1)


def _sized(x_BLD: jax.Array, like_BLD: jax.Array) -> jax.Array:
    """Returns x, scaled to the root mean square of `like` at each position."""
    own_BL1, wanted_BL1 = mean_square(x_BLD), mean_square(like_BLD)
    scale_BL1 = jnp.sqrt(wanted_BL1 / jnp.maximum(own_BL1, LEAST_SQUARE))
    return (x_BLD.astype(jnp.float32) * scale_BL1).astype(x_BLD.dtype)


# The weights of a layer, (read, mix_BLSS, write), in float32. read: the index of one stream, or
# weights of all, (B, L, S). write: from the inner layer's output to weights of writing, (B, L, S).
StreamWeights = tuple[int | jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]


class Streams(LayerModule):
    """Base class of layers on several streams, see specs.Streams for the formula.

    AltUp calls its steps predict (mix), compute (the inner layer) and correct (write)
    (arXiv 2301.13310). A subclass computes the weights.
    """

    def __init__(self, spec: specs.Streams, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.active, self.streams = spec.active, shape.streams
        self.inner = build(spec.inner, shape._replace(streams=1), rngs=rngs)
        # A sublayer behind a norm makes the same change of x and of 2 x: it reads a direction. No
        # other layer does: after a first sublayer, or in a router of x itself, the size counts.
        self.reads_direction = isinstance(self.inner, Sublayer) and self.inner.norm is not None

    def __call__(self, x_BLSD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        read, mix_BLSS, write = self.weights(x_BLSD)
        mixed_BLSD = self.mix(mix_BLSS, x_BLSD)
        if isinstance(read, int):
            u_BLD, base_BLD = x_BLSD[:, :, read], mixed_BLSD[:, :, read]
        else:
            base_BLSD = mixed(read[:, :, None], x_BLSD, skip_equal=self.reads_direction)
            base_BLD = base_BLSD[:, :, 0]
            u_BLD = base_BLD.astype(x_BLSD.dtype)
        out = self.inner(u_BLD, at, call.inside(0), cache)
        change_BLD = out.x.astype(jnp.float32) - base_BLD
        new_BLSD = mixed_BLSD + mixed(write(out.x)[..., None], change_BLD[:, :, None])
        records = under("inner", out.records)
        return out._replace(x=new_BLSD.astype(x_BLSD.dtype), records=records)

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> Any:
        return self.inner.empty(batch, length, slack, dtype)

    def weights(self, x_BLSD: jax.Array) -> StreamWeights:
        raise NotImplementedError

    def mix(self, mix_BLSS: jax.Array, x_BLSD: jax.Array) -> jax.Array:
        """Returns the mixed streams in float32, before the inner layer's output is added."""
        return mixed(mix_BLSS, x_BLSD)


class AltUp(Streams):
    """Alternating Updates (arXiv 2301.13310): mix = p, write = g, and the active stream is read."""

    def __init__(self, spec: specs.AltUp, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec, shape, rngs=rngs)
        self.learned = spec.learned
        if spec.learned:
            self.p, self.g = _mixing(jnp.eye(shape.streams)), _mixing(jnp.ones(shape.streams))

    def weights(self, x_BLSD: jax.Array) -> StreamWeights:
        p_11SS = (read(self.p) if self.learned else jnp.eye(self.streams))[None, None]
        g_11S = (read(self.g) if self.learned else jnp.ones(self.streams))[None, None]
        return self.active, p_11SS, lambda _: g_11S


class SimplifiedAltUp(Streams):
    """Simplified AltUp, which reads sum_j r_j x_j and writes to the active stream only."""

    def __init__(self, spec: specs.SimplifiedAltUp, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec, shape, rngs=rngs)
        self.r = _mixing(jnp.full(shape.streams, 1 / shape.streams))

    def weights(self, x_BLSD: jax.Array) -> StreamWeights:
        r_11S, eye_SS = read(self.r)[None, None], jnp.eye(self.streams)
        write_11S = self.streams * eye_SS[self.active][None, None]
        return r_11S, eye_SS[None, None], lambda _: write_11S


class HyperConnection(Streams):
    """Hyper-connections, static or dynamic (arXiv 2409.19606), see specs.HyperConnection."""

    def __init__(self, spec: specs.HyperConnection, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec, shape, rngs=rngs)
        eye_SS, d = jnp.eye(shape.streams), shape.d_model
        self.a_m, self.a_r = _mixing(eye_SS[spec.active]), _mixing(eye_SS)
        self.b = _mixing(jnp.ones(shape.streams))
        self.dynamic = spec.dynamic
        if spec.dynamic:
            self.norm = RMSNorm(d, shape)
            self.w = make_param(jnp.zeros((d, shape.streams + 2)), ("embed", None))
            self.scales = _mixing(jnp.full(2, DYNAMIC_SCALE))

    def weights(self, x_BLSD: jax.Array) -> StreamWeights:
        a_m_BLS, a_r_BLSS, b_BLS = (read(w)[None, None] for w in (self.a_m, self.a_r, self.b))
        if self.dynamic:
            batch, length, streams, width = x_BLSD.shape
            norm_BLD = self.norm(x_BLSD.reshape(batch, length * streams, width))  # L * S of them
            found = jnp.tanh(linear(norm_BLD, read(self.w))).reshape(batch, length, streams, -1)
            alpha, beta = read(self.scales)
            a_m_BLS += alpha * found[..., 0]
            b_BLS += beta * found[..., 1]
            a_r_BLSS += alpha * found[..., 2:]
        return a_m_BLS, a_r_BLSS.swapaxes(2, 3), lambda _: b_BLS


class ManifoldHyperConnection(Streams):
    """Hyper-connections whose mix is doubly stochastic (mHC, arXiv 2512.24880)."""

    def __init__(self, spec: specs.ManifoldHyperConnection, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec, shape, rngs=rngs)
        s, self.eps = shape.streams, shape.norm_eps
        self.w = make_param(jnp.zeros((s * shape.d_model, s * (s + 2))), ("embed", None))
        near_SS = jnp.where(jnp.eye(s) > 0, NEAR, (1 - NEAR) / (s - 1))
        self.b_read = _mixing(jax.scipy.special.logit(near_SS[spec.active]))
        self.b_write, self.b_mix = _mixing(jnp.zeros(s)), _mixing(jnp.log(near_SS))
        self.scales = _mixing(jnp.full(3, DYNAMIC_SCALE))

    def weights(self, x_BLSD: jax.Array) -> StreamWeights:
        batch, length, s = x_BLSD.shape[:3]
        found = linear(unit_rms(x_BLSD.reshape(batch, length, -1), self.eps), read(self.w))
        parts = jnp.split(found, (s, 2 * s), axis=2)
        scaled = [scale * part for scale, part in zip(read(self.scales), parts, strict=True)]
        read_BLS = jax.nn.sigmoid(scaled[0] + read(self.b_read)[None, None])
        write_BLS = 2 * jax.nn.sigmoid(scaled[1] + read(self.b_write)[None, None])
        logits_BLSS = scaled[2].reshape(batch, length, s, s) + read(self.b_mix)[None, None]
        mix_BLSS = _doubly_stochastic(logits_BLSS).swapaxes(2, 3)
        return read_BLS, mix_BLSS, lambda _: write_BLS

    def mix(self, mix_BLSS: jax.Array, x_BLSD: jax.Array) -> jax.Array:
        # Each stream's weights sum to 1. Written by differences, equal streams stay equal to the
        # last bit, and their mix has a gradient of exactly 0 in place of rounding noise.
        x_BLSD = x_BLSD.astype(jnp.float32)
        first_BL1D = x_BLSD[:, :, :1]
        return first_BL1D + mixed(mix_BLSS[..., 1:], x_BLSD[:, :, 1:] - first_BL1D)


def _doubly_stochastic(logits_BLSS: jax.Array) -> jax.Array:
    """Returns exp(logits), its rows and columns scaled in turn to sum to 1 (Sinkhorn-Knopp)."""

    def one_round(_: int, m_BLSS: jax.Array) -> jax.Array:
        for dim in (3, 2):
            m_BLSS = m_BLSS / jnp.sum(m_BLSS, axis=dim, keepdims=True)
        return m_BLSS

    positive_BLSS = jax.nn.softmax(logits_BLSS, axis=3) + LEAST_SHARE
    return jax.lax.fori_loop(0, specs.SINKHORN_ROUNDS, one_round, positive_BLSS)


class Gemma3nAltUp(Streams):
    """Gemma 3n's AltUp: reads the predicted stream, with weights computed at each position."""

    def __init__(self, spec: specs.Gemma3nAltUp, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec, shape, rngs=rngs)
        self.reads_direction = False  # the weights of writing follow the size of what was read
        s, d = shape.streams, shape.d_model
        self.norm = RMSNorm(d, shape)
        self.w = normal_param(rngs, (d, s), ("replicated", None), std=1 / math.sqrt(d))
        self.p, self.c = _mixing(jnp.zeros((s, s, s))), _mixing(jnp.zeros((s, s)))

    def weights(self, x_BLSD: jax.Array) -> StreamWeights:
        flat = read(self.p).reshape(self.streams, -1)
        mix = linear(self._modes(x_BLSD[:, :, self.active]), flat)
        mix_BLSS = mix.reshape(*x_BLSD.shape[:2], self.streams, -1)
        mix_BLSS += jnp.eye(self.streams)[None, None]

        def write(y_BLD: jax.Array) -> jax.Array:
            return 1 + linear(self._modes(y_BLD), read(self.c))

        return mix_BLSS[:, :, self.active], mix_BLSS, write

    def _modes(self, x_BLD: jax.Array) -> jax.Array:
        return jnp.tanh(linear(self.norm(x_BLD), read(self.w)) / x_BLD.shape[2])


def _mixing(value: jax.Array) -> nnx.Param:
    """Returns a small parameter without weight decay."""
    return make_param(value, ("replicated",) * value.ndim, decays=False)


def mixed(weights_BLSS: jax.Array, x_BLSD: jax.Array, *, skip_equal: bool = False) -> jax.Array:
    """Returns sum_j weights_ij x_j for each i, (B, L, S, D), in float32.

    skip_equal: positions whose streams are all equal give the weights no gradient. There the
      weights only scale the sum. If later layers read only its direction, the true gradient is 0.
      The computed one is rounding noise, from which AdamW would make a full step.
    """
    return _mixed(skip_equal, weights_BLSS, x_BLSD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(skip_equal: bool, weights_BLSS: jax.Array, x_BLSD: jax.Array) -> jax.Array:
    x32_BLSD = x_BLSD.astype(jnp.float32)
    each = [weights_BLSS[..., j, None] * x32_BLSD[:, :, j, None] for j in range(x_BLSD.shape[2])]
    return functools.reduce(jnp.add, each)


def _forward(skip_equal: bool, weights_BLSS: jax.Array, x_BLSD: jax.Array) -> Any:
    return _mixed(skip_equal, weights_BLSS, x_BLSD), (weights_BLSS, x_BLSD)


def _backward(skip_equal: bool, inputs: tuple[jax.Array, jax.Array], grad_BLSD: jax.Array) -> Any:
    """Multiplies position by position and sums over positions afterwards.

    XLA's CPU backend takes 2 to 6 times as long for the sum over positions and width at once.
    """
    weights_BLSS, x_BLSD = inputs
    x32_BLSD = x_BLSD.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST  # they sum over many positions
    products_BLSS = jnp.einsum("BLSD,BLJD->BLSJ", grad_BLSD, x32_BLSD, precision=exact)
    if skip_equal:
        differ_BL = jnp.any(x_BLSD != x_BLSD[:, :, :1], axis=(2, 3))
        products_BLSS = jnp.where(differ_BL[:, :, None, None], products_BLSS, 0.0)
    products_BLSS = jax.lax.optimization_barrier(products_BLSS)
    shared = tuple(dim for dim in (0, 1) if weights_BLSS.shape[dim] == 1)
    grad_of_weights = jnp.sum(products_BLSS, axis=shared, keepdims=True)
    grad_of_x: Any = _mixed(False, weights_BLSS.swapaxes(2, 3), grad_BLSD)
    return grad_of_weights, grad_of_x.astype(x_BLSD.dtype)


_mixed.defvjp(_forward, _backward)
