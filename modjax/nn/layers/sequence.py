"""Layers that process every k-th position only, the anchors.

The anchors of a row are every k-th position from the first: training slices them, without a gather.
After n earlier positions of a row, the next anchor is the (-n mod k)-th new position. Within a
selection of packed documents, the anchors follow from the documents, see `_anchors_of_documents`.

Legend: B batch, L positions, K selected positions, J anchors, I the last earlier anchor and the J
anchors.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.nn.build import LayerModule, build
from modjax.nn.cache import LayerCache, overflow, unwritten, where_read, written
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers.streams import mixed
from modjax.nn.params import make_param, read
from modjax.nn.records import inside
from modjax.nn.routing.selection import gather, scatter_add, select_first_k, wide
from modjax.nn.routing.within import run_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AnchorCache(LayerCache):
    """Cache of an anchored layer. Its update has the same fields, for the new positions.

    inner: the cache of the inner layer.
    count_B: the number of positions that each row has read.
    base: the input of the last anchor; in StridePool the sum of positions since then, (B, ...).
    change: the change that the inner layer made to the last anchor, (B, ...).
    """

    inner: Any
    count_B: jax.Array
    base: jax.Array
    change: jax.Array

    def overflow(self) -> Any:
        return overflow(self.inner)

    def written(self, write: "AnchorCache", *, fresh: bool = False) -> "AnchorCache":
        last = where_read(write.count_B, (write.base, write.change), (self.base, self.change))
        inner = written(self.inner, write.inner, fresh=fresh)
        return AnchorCache(inner, self.count_B + write.count_B, *last)


class Places(NamedTuple):
    """The places of the anchors among L positions.

    indices_BJ: the anchors, ascending; some may be beyond the end.
    anchor_BL: which positions are anchors.
    number_BL: the number of anchors up to each position, itself included.
    regular: whether the anchors are every stride-th position from the first.
    """

    indices_BJ: jax.Array
    anchor_BL: jax.Array
    number_BL: jax.Array
    stride: int
    regular: bool

    def pick(self, leaf: jax.Array) -> jax.Array:
        """Returns the anchors of an array (B or 1, L, ...); 0 beyond the end."""
        return leaf[:, :: self.stride] if self.regular else gather(leaf, self.indices_BJ)

    def spread(self, leaf_BI: jax.Array) -> jax.Array:
        """Returns for each position the entry of its last anchor, (B, L, ...)."""
        if self.regular:
            length = self.anchor_BL.shape[1]
            return jnp.repeat(leaf_BI[:, 1:], self.stride, axis=1)[:, :length]
        return _rows(leaf_BI, self.number_BL)


def find_places(x: jax.Array, at: At, stride: int, first_B: jax.Array | None, call: Call) -> Places:
    """Returns the places of the anchors. first_B: the first anchor of each row; None means 0."""
    batch, length = x.shape[:2]
    if first_B is None and call.selected and at.segments_BL is not None:
        anchor_BL = _anchors_of_documents(stride, at.segments_BL, at.valid_BL)
        none_BL = jnp.zeros((batch, length))
        picked = select_first_k(anchor_BL, none_BL, -(-length // stride))
        return Places(picked.indices_BK, anchor_BL, jnp.cumsum(anchor_BL, axis=1), stride, False)
    start_B1 = jnp.zeros((batch, 1), jnp.int32) if first_B is None else first_B[:, None]
    indices_BJ = start_B1 + jnp.arange(0, length, stride)[None]
    past_BL = jnp.arange(length)[None] - start_B1
    anchor_BL, number_BL = past_BL % stride == 0, past_BL // stride + 1
    return Places(indices_BJ, anchor_BL, number_BL, stride, regular=first_B is None)


def _anchors_of_documents(
    stride: int, segments_BL: jax.Array, valid_BL: jax.Array | None
) -> jax.Array:
    """Returns the anchors of a selection of packed documents, (B, L) bool; see specs.Anchored.

    The anchors of a document must not depend on how many positions of earlier documents were
    selected. A row has at most ceil(L / stride) anchors, so only one document, that with id 1, may
    begin with an anchor.
    """
    places_1L = jnp.arange(segments_BL.shape[1])[None]
    begins_BL = segments_BL != jnp.roll(segments_BL, 1, axis=1)
    first_BL = jax.lax.cummax(jnp.where(begins_BL, places_1L, 0), axis=1)
    turn_BL = jnp.where(segments_BL == 1, 0, stride - 1)
    anchor_BL = (places_1L - first_BL) % stride == turn_BL
    return anchor_BL if valid_BL is None else anchor_BL & valid_BL


class Anchored(LayerModule):
    """Base class of layers that run `inner` on the anchors and compute the other positions."""

    def __init__(self, spec: specs.Anchored, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.stride = spec.stride
        self.inner = build(spec.inner, shape, rngs=rngs)
        streams = (shape.streams,) if shape.streams > 1 else ()
        self.vector = *streams, shape.d_model

    def __call__(self, x: jax.Array, at: At, call: Call, cache: AnchorCache | None = None) -> Out:
        batch, length = x.shape[:2]
        old, first_B = cache, None
        if old is None:
            none = jnp.zeros((batch, *x.shape[2:]), x.dtype)
            old = AnchorCache(None, jnp.zeros(batch, jnp.int32), none, none)
        elif not call.fresh:
            first_B = -old.count_B % self.stride
        places = find_places(x, at, self.stride, first_B, call)
        if not places.regular and at.valid_BL is None:
            at = at._replace(valid_BL=jnp.ones((batch, length), bool))
        seen_BJ, base_BI = self.see(x, at, places, old)
        inputs = seen_BJ, jax.tree.map(places.pick, at), old.inner
        out = self._run(inputs, call, step=length == 1 and first_B is not None)
        change_BI = _after(old.change, out.x - self.predicted(seen_BJ))
        new = self.corrected(x, places, base_BI, change_BI)
        if at.segments_BL is not None:
            new = jnp.where(wide(_own_document(at.segments_BL, places), x), new, x)
        valid_BJ = inputs[1].valid_BL
        valid_BJ = jnp.ones(places.indices_BJ.shape, bool) if valid_BJ is None else valid_BJ
        write: Any = ()
        if cache is not None:
            last_B = jnp.sum(valid_BJ, axis=1, dtype=jnp.int32)
            last = _rows(base_BI, last_B), _rows(change_BI, last_B)
            write = AnchorCache(out.write, at.count(batch, length), *last)
        depth_BJ = jnp.where(valid_BJ, out.depth_BL, 0)
        none_BL = jnp.zeros((batch, length), depth_BJ.dtype)
        depth_BL = scatter_add(none_BL, places.indices_BJ, depth_BJ)
        records = under("inner", inside(dict(out.records), places.indices_BJ, valid_BJ))
        return Out(new, write, records, {}, depth_BL)

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> AnchorCache:
        inner = self.inner.empty(batch, -(-length // self.stride), slack, dtype)
        vector = jnp.zeros((batch, *self.vector), dtype)
        return AnchorCache(inner, jnp.zeros(batch, jnp.int32), vector, vector)

    def see(
        self, x: jax.Array, at: At, places: Places, old: AnchorCache
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the input of the inner layer, and `AnchorCache.base` after each anchor."""
        seen_BJ = places.pick(x)
        return seen_BJ, _after(old.base, seen_BJ)

    def predicted(self, seen_BJ: jax.Array) -> jax.Array:
        """Returns the predicted values of the anchors, before correction."""
        return seen_BJ

    def corrected(
        self, x: jax.Array, places: Places, base_BI: jax.Array, change_BI: jax.Array
    ) -> jax.Array:
        """Returns the new x; by default each position adds the change of its last anchor.

        base, change: `AnchorCache.base` and `change` after each anchor.
        """
        return x + places.spread(change_BI)

    def _run(self, inputs: tuple[jax.Array, At, Any], call: Call, *, step: bool) -> Out:
        """Returns the output of the inner layer from its inputs: x, context and cache.

        A decoding step runs it only in rows whose new position is an anchor, and reports nothing.
        """

        layout = "part" if call.layout == "whole" else call.layout
        inner_call = call.inside(0)._replace(layout=layout)

        def run(inputs: tuple[jax.Array, At, Any]) -> Out:
            return self.inner(*inputs[:2], inner_call, inputs[2])

        def run_step(inputs: tuple[jax.Array, At, Any]) -> Out:
            out, none_BL = run(inputs), jnp.zeros(inputs[0].shape[:2], jnp.int32)
            return Out(out.x, unwritten(out.write), {}, {}, none_BL + out.depth_BL)

        if not step:
            return run(inputs)
        is_anchor_B1: Any = inputs[1].valid_BL
        return run_rows(run_step, inputs, is_anchor_B1[:, 0])


class SequenceAltUp(Anchored):
    """Layer that predicts each position from itself and its anchor (arXiv 2301.13310)."""

    def __init__(self, spec: specs.SequenceAltUp, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec, shape, rngs=rngs)
        self.scalars = make_param(jnp.array([1.0, 0.0, 1.0]), ("replicated",))  # a1, a2 and b

    def predicted(self, seen_BJ):
        return _sum(read(self.scalars)[:2], seen_BJ, seen_BJ)

    def corrected(self, x, places, base_BI, change_BI):
        changed_BI = _sum(read(self.scalars)[1:], base_BI, change_BI)
        return _sum(read(self.scalars)[:1], x) + places.spread(changed_BI)


class StrideSkip(Anchored):
    """Layer that changes the anchors only."""

    def corrected(self, x, places, base_BI, change_BI):
        new = super().corrected(x, places, base_BI, change_BI)
        return jnp.where(wide(places.anchor_BL, x), new, x)


class StridePool(Anchored):
    """Layer whose `inner` reads the mean of the positions since the previous anchor."""

    def see(self, x, at, places, old):
        # Every position belongs to the next anchor: its number, J if it is beyond these.
        next_BL = places.number_BL - places.anchor_BL.astype(jnp.int32)
        mine_BL = jnp.ones(x.shape[:2], bool) if at.valid_BL is None else at.valid_BL
        if at.segments_BL is not None:
            anchors_BI = jnp.pad(places.pick(at.segments_BL), ((0, 0), (0, 1)))
            mine_BL &= _rows(anchors_BI, next_BL) == at.segments_BL
        waiting_B = jnp.where(old.count_B > 0, (old.count_B - 1) % places.stride, 0)

        def pooled(leaf: jax.Array, first: jax.Array) -> jax.Array:
            own = jnp.where(wide(mine_BL, leaf), leaf, jnp.zeros_like(leaf))
            groups = places.indices_BJ.shape[1] + 1
            sums = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, groups))(own, next_BL)
            return sums.at[:, 0].add(first)

        sums_BI = pooled(x.astype(jnp.float32), old.base.astype(jnp.float32))
        counts_BI = pooled(jnp.ones(x.shape[:2]), waiting_B.astype(jnp.float32))
        means_BI = sums_BI / wide(jnp.maximum(counts_BI, 1.0), sums_BI)
        return means_BI[:, :-1].astype(x.dtype), sums_BI.astype(x.dtype)


def _own_document(segments_BL: jax.Array, places: Places) -> jax.Array:
    """Returns which positions have an anchor before them in their own document, (B, L) bool."""
    anchors_BJ = places.pick(segments_BL)
    own_BL = places.spread(_after(anchors_BJ[:, 0], anchors_BJ)) == segments_BL
    return own_BL & (places.number_BL > 0)


def _sum(weights: jax.Array, *each: jax.Array) -> jax.Array:
    """Returns a weighted sum, computed in float32 with the fast gradient of `mixed`."""

    def weighted(weight: jax.Array, x: jax.Array) -> jax.Array:
        flat = x.reshape(*x.shape[:2], 1, -1)
        return mixed(weight.reshape(1, 1, 1, 1), flat).reshape(x.shape)

    terms = (weighted(w, part) for w, part in zip(weights, each, strict=True))
    return functools.reduce(jnp.add, terms).astype(each[0].dtype)


def _after(first: jax.Array, others: jax.Array) -> jax.Array:
    """Returns (B, ...) and (B, J, ...) concatenated to (B, I, ...)."""
    return jnp.concatenate([first[:, None], others], axis=1)


def _rows(leaf_BI: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns each row's entry at its index, or its entries at its indices."""
    return jax.vmap(lambda leaf_I, i: leaf_I[i])(leaf_BI, index_B)
