"""Selections of positions: top-k and first-k make them, gather and scatter use them.

Positions are selected within each sequence separately, and all shapes are static.

Legend: B batch, L positions, K selected positions, D model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from modjax.sharding import per_sequence

# Ranks that differ by less than this share of their row's largest count as equal: other devices and
# other batches round them differently.
ROUNDING = 2.0**-18
# Name of scores and selections, which rematerialisation always keeps: they are few numbers.
ROUTING = "routing"
IN_BOUNDS = "promise_in_bounds"


class Selection(NamedTuple):
    """K positions of each sequence.

    indices_BK: positions, ascending. Entries that are not valid are L or more, so that gathers read
      zeros and scatters drop them.
    scores_BK: the router's raw scores at these positions, differentiable; 0 where not valid.
    valid_BK: False for the entries that a sequence leaves unused.
    tied_B: whether a top k left out a position that ties with the k-th best, to within ROUNDING;
      None for other selections.
    kth_B: the k-th highest ranking score, infinite where k is 0; None without a ranking.
    padded: whether entries may be not valid. Gathers and scatters are faster without.
    """

    indices_BK: jax.Array
    scores_BK: jax.Array
    valid_BK: jax.Array
    tied_B: Any = None
    kth_B: Any = None
    padded: bool = True


def position_noise(
    key: jax.Array, sequences_BL: jax.Array | None, positions_BL: jax.Array
) -> jax.Array:
    """Returns Gaussian noise (B, L) that depends on the key, the sequence and the position alone.

    A token therefore gets the same noise in a whole sequence and token by token, in any row of a
    batch and at any place of a selection.
    """
    if sequences_BL is None:
        raise ValueError("random routing needs At.sequences_BL, the sequence of each position")

    def one(sequence, position):
        own = jax.random.fold_in(jax.random.fold_in(key, sequence), position)
        return jax.random.normal(own, (), jnp.float32)

    return jax.vmap(jax.vmap(one))(*jnp.broadcast_arrays(sequences_BL, positions_BL))


def of_valid(
    number: Callable[[int], int], valid_BL: jax.Array | None, batch: int, length: int
) -> jax.Array:
    """Returns number(n) for the n valid positions of each row, (B,) int32; 0 for a row without any.

    valid_BL: None if all `length` positions of every row are valid.
    """
    if valid_BL is None:
        return jnp.full(batch, number(length), jnp.int32)
    # A table, because float32 rounds some shares differently from Python.
    table = np.array([0, *(number(n) for n in range(1, length + 1))], np.int32)
    return jnp.asarray(table)[jnp.sum(valid_BL, axis=1)]


@jax.named_scope("top_k")
def select_first_k(
    requested_BL: jax.Array, scores_BL: jax.Array, k: int, k_B: jax.Array | None = None
) -> Selection:
    """Selects each row's first k (or k_B <= k) requested positions and drops the others."""
    # A top-k gives ties to the earlier position.
    count_B = jnp.minimum(k if k_B is None else k_B, jnp.sum(requested_BL, axis=1))
    return _best(requested_BL.astype(jnp.float32), scores_BL, k, count_B)


@jax.named_scope("top_k")
def select_top_k(
    ranking_BL: jax.Array,
    scores_BL: jax.Array,
    k: int,
    valid_BL: jax.Array | None,
    k_B: jax.Array | None = None,
) -> Selection:
    """Selects each row's k highest-ranked valid positions, in order of position.

    Positions that tie with the k-th best, to within ROUNDING, are taken from the first one on, so
    that rounding does not decide. ROUNDING is a share of the row's largest absolute ranking score:
    an outlier widens it.

    valid_BL: None if all are valid and every row selects k; otherwise a row selects k_B <= k.
    """
    ranking_BL = jax.lax.stop_gradient(ranking_BL)
    count_B = None
    if valid_BL is not None:
        ranking_BL = jnp.where(valid_BL, ranking_BL, -jnp.inf)
        count_B = jnp.minimum(k if k_B is None else k_B, jnp.sum(valid_BL, axis=1))
    best_BK = per_sequence(lambda ranking_BL: jax.lax.top_k(ranking_BL, k)[0], ranking_BL)
    kth_B = best_BK[:, -1]
    if count_B is not None:
        counted_BK = jnp.arange(k)[None] < count_B[:, None]
        kth_B = jnp.min(jnp.where(counted_BK, best_BK, jnp.inf), axis=1)
    kth_B1 = kth_B[:, None]
    size_BL = jnp.where(jnp.isfinite(ranking_BL), jnp.abs(ranking_BL), 0.0)
    within_B1 = ROUNDING * jnp.max(size_BL, axis=1, keepdims=True)
    alike_BL = jnp.abs(ranking_BL - kth_B1) <= within_B1
    candidates_B = jnp.sum(alike_BL | (ranking_BL > kth_B1), axis=1)
    selection = _best(jnp.where(alike_BL, kth_B1, ranking_BL), scores_BL, k, count_B)
    tied_B = candidates_B > (k if count_B is None else count_B)
    return selection._replace(tied_B=tied_B, kth_B=kth_B)


def _best(
    ranking_BL: jax.Array, scores_BL: jax.Array, k: int, count_B: jax.Array | None
) -> Selection:
    """Selects each row's count_B <= k best (None: k). The earlier of two equal positions wins."""
    indices_BK = per_sequence(lambda ranking_BL: jax.lax.top_k(ranking_BL, k)[1], ranking_BL)
    valid_BK = jnp.ones(indices_BK.shape, bool)
    if count_B is not None:
        valid_BK = jnp.arange(k)[None] < count_B[:, None]  # the best come first
        # Distinct indices beyond the end keep "sorted and unique" true for the scatter.
        beyond_K = ranking_BL.shape[1] + jnp.arange(k, dtype=indices_BK.dtype)
        indices_BK = jnp.where(valid_BK, indices_BK, beyond_K[None])
    indices_BK = checkpoint_name(jnp.sort(indices_BK, axis=1), ROUTING)
    padded = count_B is not None
    scores_BK = gather(scores_BL, indices_BK, padded=padded)
    return Selection(indices_BK, scores_BK, valid_BK, padded=padded)


@jax.named_scope("gather")
def gather(tree: Any, indices_BK: jax.Array, *, padded: bool = True) -> Any:
    """Returns a tree of arrays (B or 1, L, ...) at the indices, (B, K, ...); 0 beyond the end.

    padded: whether an index may lie beyond the end.
    """
    mode: dict[str, Any] = {"mode": "fill", "fill_value": 0} if padded else {"mode": IN_BOUNDS}

    def one(x_L, indices_K):
        return x_L.at[indices_K].get(indices_are_sorted=True, unique_indices=True, **mode)

    def rows(x_BL):
        shared = x_BL.shape[0] == 1
        return jax.vmap(one, (None if shared else 0, 0))(x_BL[0] if shared else x_BL, indices_BK)

    return jax.tree.map(rows, tree)


@jax.named_scope("scatter")
def scatter_add(
    x_BLD: jax.Array, indices_BK: jax.Array, update_BKD: jax.Array, *, padded: bool = True
) -> jax.Array:
    """Adds updates at each sequence's indices; other positions keep their bits. See `gather`."""

    def one(x_LD, indices_K, update_KD):
        return x_LD.at[indices_K].add(
            update_KD,
            mode="drop" if padded else IN_BOUNDS,
            indices_are_sorted=True,
            unique_indices=True,
        )

    return jax.vmap(one)(x_BLD, indices_BK, update_BKD)


def wide(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a mask or weight with dims of 1 appended, as many dims as `like` has."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def selected_mask(selection: Selection, length: int) -> jax.Array:
    """Returns the selected positions as a mask, (B, L) bool."""
    zeros_BL = jnp.zeros((len(selection.indices_BK), length), jnp.int32)
    ones_BK = selection.valid_BK.astype(jnp.int32)
    return scatter_add(zeros_BL, selection.indices_BK, ones_BK, padded=selection.padded) > 0
