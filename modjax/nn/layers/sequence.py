"""Layers that process every k-th position only, the anchors.

In training the anchors of a row are every k-th position from the first: they are sliced, not
gathered. After n earlier positions of a row, the next anchor is the (-n mod k)-th new position.
Within a selection of packed documents the anchors follow from the documents, see `_every`.

Legend: B batch, L positions, K selected positions, J anchors, I anchors with the last one before.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.nn.build import LayerModule, build
from modjax.nn.cache import overflow, unwritten, written
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers.streams import mixed
from modjax.nn.params import make_param, read
from modjax.nn.records import inside
from modjax.nn.routing.selection import gather, scatter_add, select_first_k, wide
from modjax.nn.routing.within import run_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """The cache of anchors, and its own update, which has the same fields for the new positions.

    inner: of the inner layer. count_B: positions read of each row.
    held: the input of the last anchor, or the sum of positions that are not pooled yet, (B, ...).
    news: the change that the inner layer made to the last anchor, (B, ...).
    """

    inner: Any
    count_B: jax.Array
    held: jax.Array
    news: jax.Array

    @property
    def overflow_B(self) -> Any:
        return overflow(self.inner)

    def written(self, write: "Kept", *, fresh: bool = False) -> "Kept":
        read_B, vectors = write.count_B > 0, ((self.held, write.held), (self.news, write.news))
        return Kept(
            written(self.inner, write.inner, fresh=fresh),
            self.count_B + write.count_B,
            *(jnp.where(wide(read_B, old), new, old) for old, new in vectors),
        )


class Places:
    """The places of the anchors among L positions.

    first_B: the first anchor of each row; None, 0. selected: see `Call`.
    indices_BJ: the anchors, ascending; some lie beyond the end. anchor_BL: the same as a mask.
    number_BL: the number of anchors up to each position.
    """

    def __init__(
        self, x: jax.Array, at: At, stride: int, first_B: jax.Array | None, *, selected: bool
    ):
        batch, length = x.shape[:2]
        self.length, self.stride = length, stride
        apart_BL = at.segments_BL if first_B is None and selected else None
        self.regular = first_B is None and apart_BL is None
        if apart_BL is not None:
            self.anchor_BL = _every(stride, apart_BL, at.valid_BL)
            none_BL = jnp.zeros((batch, length))
            picked = select_first_k(self.anchor_BL, none_BL, -(-length // stride))
            self.indices_BJ = picked.indices_BK
            self.number_BL = jnp.cumsum(self.anchor_BL, axis=1)
        else:
            start_B1 = jnp.zeros((batch, 1), jnp.int32) if first_B is None else first_B[:, None]
            self.indices_BJ = start_B1 + jnp.arange(0, length, stride)[None]
            past_BL = jnp.arange(length)[None] - start_B1
            self.anchor_BL = past_BL % stride == 0
            self.number_BL = past_BL // stride + 1

    def pick(self, leaf: jax.Array) -> jax.Array:
        """Returns the anchors of (B or 1, L, ...); 0 beyond the end."""
        return leaf[:, :: self.stride] if self.regular else gather(leaf, self.indices_BJ)

    def put(self, leaf_BJ: jax.Array) -> jax.Array:
        """Returns numbers of the anchors at their positions, 0 elsewhere, (B, L)."""
        none_BL = jnp.zeros((leaf_BJ.shape[0], self.length), leaf_BJ.dtype)
        return scatter_add(none_BL, self.indices_BJ, leaf_BJ)

    def spread(self, leaf_BI: jax.Array) -> jax.Array:
        """Returns the entry of every position's anchor, (B, L, ...)."""
        if self.regular:
            return jnp.repeat(leaf_BI[:, 1:], self.stride, axis=1)[:, : self.length]
        return _rows(leaf_BI, self.number_BL)


def _every(stride: int, segments_BL: jax.Array, valid_BL: jax.Array | None) -> jax.Array:
    """Returns the anchors of a selection of packed documents, (B, L); see specs.Anchored.

    The anchors of a document must not depend on how many positions of the one before were selected.
    A row has at most ceil(L / stride) anchors, so only one document may begin with an anchor.
    """
    places_1L = jnp.arange(segments_BL.shape[1])[None]
    begins_BL = segments_BL != jnp.roll(segments_BL, 1, axis=1)
    first_BL = jax.lax.cummax(jnp.where(begins_BL, places_1L, 0), axis=1)
    turn_BL = jnp.where(segments_BL == 1, 0, stride - 1)
    anchor_BL = (places_1L - first_BL) % stride == turn_BL
    return anchor_BL if valid_BL is None else anchor_BL & valid_BL


class Anchored(LayerModule):
    """Base class: anchors run through the inner layer; a subclass says how the others follow."""

    def __init__(self, spec: specs.Anchored, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.stride = spec.stride
        self.inner = build(spec.inner, shape, rngs=rngs)
        self.width = (shape.streams, shape.d_model)[shape.streams == 1 :]

    def __call__(self, x: jax.Array, at: At, call: Call, cache: Kept | None = None) -> Out:
        batch, length = x.shape[:2]
        none = jnp.zeros((batch, *x.shape[2:]), x.dtype)
        read_B = jnp.zeros(batch, jnp.int32) if cache is None else cache.count_B
        held, news = (none, none) if cache is None else (cache.held, cache.news)
        fresh = cache is None or call.fresh
        first_B = None if fresh else -read_B % self.stride
        places = Places(x, at, self.stride, first_B, selected=call.selected)
        if not places.regular and at.valid_BL is None:
            at = at._replace(valid_BL=jnp.ones((batch, length), bool))
        seen_BJ, held_BI = self.see(x, at, places, held, read_B)
        inner_cache = None if cache is None else cache.inner
        inputs = seen_BJ, jax.tree.map(places.pick, at), inner_cache

        def run(inputs: tuple[jax.Array, At, Any]) -> Out:
            return self.inner(*inputs[:2], call.inside(0), inputs[2])

        if length == 1 and not fresh:  # as MoD, a decode step reports nothing from inside

            def read(inputs: tuple[jax.Array, At, Any]) -> Out:
                out, none_BL = run(inputs), jnp.zeros(inputs[0].shape[:2], jnp.int32)
                depth_BL = none_BL + out.depth_BL
                return Out(out.x, unwritten(out.write), {}, {}, depth_BL)

            out = run_rows(read, inputs, inputs[1].valid_BL[:, 0])
        else:
            out = run(inputs)
        news_BI = _after(news, out.x - self.predicted(seen_BJ))
        new = self.corrected(x, places, held_BI, news_BI)
        if at.segments_BL is not None:
            anchors_BJ = places.pick(at.segments_BL)
            own_BL = places.spread(_after(anchors_BJ[:, 0], anchors_BJ)) == at.segments_BL
            own_BL &= places.number_BL > 0
            new = jnp.where(wide(own_BL, x), new, x)
        valid_BJ = inputs[1].valid_BL
        valid_BJ = jnp.ones(places.indices_BJ.shape, bool) if valid_BJ is None else valid_BJ
        write: Any = ()
        if cache is not None:
            last_B = jnp.sum(valid_BJ, axis=1, dtype=jnp.int32)
            vectors = _rows(held_BI, last_B), _rows(news_BI, last_B)
            write = Kept(out.write, at.count(batch, length), *vectors)
        depth_BL = places.put(jnp.where(valid_BJ, out.depth_BL, 0))
        records = under("inner", inside(dict(out.records), places.indices_BJ, valid_BJ))
        return Out(new, write, records, {}, depth_BL)

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> Kept:
        inner = self.inner.empty(batch, -(-length // self.stride), slack, dtype)
        vector = jnp.zeros((batch, *self.width), dtype)
        return Kept(inner, jnp.zeros(batch, jnp.int32), vector, vector)

    def see(
        self, x: jax.Array, at: At, places: Places, held: jax.Array, read_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the input of the inner layer, and `Kept.held` after each anchor, (B, I, ...)."""
        seen_BJ = places.pick(x)
        return seen_BJ, _after(held, seen_BJ)

    def predicted(self, seen_BJ: jax.Array) -> jax.Array:
        """Returns the predicted anchors, before their correction."""
        return seen_BJ

    def corrected(
        self, x: jax.Array, places: Places, held_BI: jax.Array, news_BI: jax.Array
    ) -> jax.Array:
        """Returns the new x from `Kept.held` and `Kept.news` of all anchors."""
        return x + places.spread(news_BI)


class SequenceAltUp(Anchored):
    def __init__(self, spec: specs.SequenceAltUp, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec, shape, rngs=rngs)
        self.scalars = make_param(jnp.array([1.0, 0.0, 1.0]), ("replicated",))  # a1, a2 and b

    def predicted(self, seen_BJ: jax.Array) -> jax.Array:
        return _sum(read(self.scalars)[:2], seen_BJ, seen_BJ)

    def corrected(
        self, x: jax.Array, places: Places, held_BI: jax.Array, news_BI: jax.Array
    ) -> jax.Array:
        changed_BI = _sum(read(self.scalars)[1:], held_BI, news_BI)
        return _sum(read(self.scalars)[:1], x) + places.spread(changed_BI)


class StrideSkip(Anchored):
    def corrected(
        self, x: jax.Array, places: Places, held_BI: jax.Array, news_BI: jax.Array
    ) -> jax.Array:
        return jnp.where(
            wide(places.anchor_BL, x), super().corrected(x, places, held_BI, news_BI), x
        )


class StridePool(Anchored):
    def see(
        self, x: jax.Array, at: At, places: Places, held: jax.Array, read_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # Every position belongs to the next anchor: its number, J where it lies beyond these.
        next_BL = places.number_BL - places.anchor_BL.astype(jnp.int32)
        mine_BL = jnp.ones(x.shape[:2], bool) if at.valid_BL is None else at.valid_BL
        if at.segments_BL is not None:
            anchors_BI = jnp.pad(places.pick(at.segments_BL), ((0, 0), (0, 1)))
            mine_BL &= _rows(anchors_BI, next_BL) == at.segments_BL
        waiting_B = jnp.where(read_B > 0, (read_B - 1) % places.stride, 0)

        def pooled(leaf: jax.Array, first: jax.Array) -> jax.Array:
            kept = jnp.where(wide(mine_BL, leaf), leaf, jnp.zeros_like(leaf))
            groups = places.indices_BJ.shape[1] + 1
            sums = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, groups))(kept, next_BL)
            return sums.at[:, 0].add(first)

        sums_BI = pooled(x.astype(jnp.float32), held.astype(jnp.float32))
        counts_BI = pooled(jnp.ones(x.shape[:2]), waiting_B.astype(jnp.float32))
        means_BI = sums_BI / wide(jnp.maximum(counts_BI, 1.0), sums_BI)
        return means_BI[:, :-1].astype(x.dtype), sums_BI.astype(x.dtype)


def _sum(weights: jax.Array, *each: jax.Array) -> jax.Array:
    """Returns a weighted sum, computed in float32."""

    def weighted(weight: jax.Array, x: jax.Array) -> jax.Array:
        flat = x.reshape(*x.shape[:2], 1, -1)
        return mixed(weight.reshape(1, 1, 1, 1), flat).reshape(x.shape)

    terms = (weighted(w, part) for w, part in zip(weights, each, strict=True))
    return functools.reduce(jnp.add, terms).astype(each[0].dtype)


def _after(first: jax.Array, others: jax.Array) -> jax.Array:
    """Returns (B, ...) and (B, J, ...) as one, (B, I, ...)."""
    return jnp.concatenate([first[:, None], others], axis=1)


def _rows(leaf_BI: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns each row's entry at its index, or its entries at its indices."""
    return jax.vmap(lambda leaf_I, i: leaf_I[i])(leaf_BI, index_B)
