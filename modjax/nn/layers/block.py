"""Mixture-of-Depths around any block of any model.

Legend: B batch, L positions, K selected positions, N heads, D model width.
"""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike

from modjax.errors import InputError, require
from modjax.kernels import constrain_stream
from modjax.nn.call import At, Call, number_rows
from modjax.nn.params import read
from modjax.nn.records import Inside, Record, inside, is_record, statistics
from modjax.nn.routing.routed_layer import RoutedLayer
from modjax.nn.routing.routing_records import Routed
from modjax.nn.routing.selection import Selection, gather, scatter_add
from modjax.specs import Shape
from modjax.specs.layers.mod import MoDConfig

NORM_EPS = 1e-6  # of a router that has norms


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutedBlock(Routed):
    """Record of a MoDBlock, of its router and rules, and of the inner block's other outputs.

    own: the records of the router and the rules, by their path in the block.
    extra: everything that the inner block returned beside x, at the selected positions, or None. A
      tuple loses its first entry, a dictionary its entry x, and a named tuple's x becomes None.
      Records of layers are wrapped as `Inside`: pass them to `observe` too, by the path of their
      module, as in "inner/moe".
    indices_BK, valid_BK: the selected positions, ascending, and which of the K entries are real;
      None if there is no extra.
    """

    own: dict[str, Record]
    extra: Any = None
    indices_BK: jax.Array | None = None
    valid_BK: jax.Array | None = None

    def loss(self, tokens=None, totals=None):
        """Returns the term to add to the objective: the losses of the rules and of inner records.

        tokens: the loss of every position, for records that depend on it.
        totals: as `totals` returns them, of the whole batch; None means the record's own.
        """
        totals = totals or {}
        each = (record.loss(tokens, totals.get(path)) for path, record in self._all().items())
        return sum(each, jnp.float32(0))

    def totals(self):
        """Returns the totals of the records in `own` and `extra`, by path, where they have any."""
        found = {path: record.totals() for path, record in self._all().items()}
        return {path: sums for path, sums in found.items() if sums}

    def parts(self):
        return {"": self} | self.own

    @classmethod
    def statistics(cls, records, valid_BL):
        inner = {
            f"{name}/{path.partition('/')[2]}": one
            for name, record in records.items()
            for path, one in record._all().items()
        }
        return super().statistics(records, valid_BL) | statistics(inner, valid_BL)

    def _all(self) -> dict[str, Record]:
        """Returns the records in `own` and `extra` by path. A key "" at the end is left out."""
        tree = {"own": self.own, "extra": self.extra}
        return {
            jax.tree_util.keystr(path, simple=True, separator="/").rstrip("/"): node
            for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_record)
            if is_record(node)
        }


class MoDBlock(RoutedLayer):
    """Routes the k = max(1, round(capacity * n)) best-scored of n valid positions through `inner`.

    See arXiv 2404.02258, Eq. 1. `inner` maps (x_BKD, *per_position, **pairwise, **whole) to x_BKD,
    to a tuple that begins with it, or to a dictionary that has it under `output`. It sees only the
    selected positions, in order, with their context. The record returns its other outputs.

    output: the key of x if `inner` returns a dictionary.
    """

    def __init__(
        self,
        inner: nnx.Module,
        d_model: int,
        config: MoDConfig,
        *,
        rngs: nnx.Rngs,
        output: str = "x",
    ):
        self.inner, self.output = inner, output
        shape = Shape(d_model, 1, 1, 1, d_model, 4 * d_model, NORM_EPS)
        super().__init__(config, shape, rngs=rngs)

    def __call__(
        self,
        x_BLD: jax.Array,
        *per_position: Any,
        pairwise: Mapping[str, Any] | None = None,
        whole: Mapping[str, Any] | None = None,
        valid_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        passed: Mapping[str, jax.Array] | None = None,
        routing: str = "trained",
        slots: int | None = None,
    ) -> tuple[jax.Array, RoutedBlock]:
        """Returns the new x_BLD and the record; add the record's `loss()` to your objective.

        A rule with a threshold needs `modjax.observe` after every update. Without it the threshold
        stays 0, and a `routing` that selects by it warns.

        per_position: pytrees of arrays (B or 1, L, ...), gathered like x: positions, segment ids,
          rotary tables. Where a row selects fewer than K positions, the unused entries are 0.
        pairwise: keyword arguments (B or 1, heads or 1, L, L), gathered along both dims, like masks
          of nnx.make_causal_mask. An unused entry sees only itself (1), and no other sees it (0). A
          bias therefore needs a mask beside it.
        whole: keyword arguments that are passed on as they are, like an encoder's output.
        valid_BL: False marks padding, which is never selected.
        key: the PRNG key of random routing.
        passed: arrays (B, L, ...) that a router needs from earlier layers, by name.
        routing: "trained"; "causal", the block's own rule that never looks ahead; or a rule's name.
        slots: under causal routing, the most positions that a row processes; None means no bound.

        Raises InputError for an argument of another shape.
        """
        batch, length = x_BLD.shape[:2]
        pairwise = pairwise or {}
        _check_inputs(per_position, pairwise, batch, length)
        positions_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
        sequences_BL = number_rows(batch, length)
        at = At(positions_BL, None, valid_BL, {}, dict(passed or {}), sequences_BL)
        bound = length if slots is None else min(slots, length)
        self._warn_unmeasured(routing)
        call = Call(routing=routing, key=key)
        selection, records, _ = self.route(x_BLD, at, call, self.start(batch), bound)
        own: Any = records.pop("")
        process = functools.partial(self._process, x_BLD, per_position, pairwise, whole or {})
        x_BLD, beside = self.run(process, selection, own, bound)
        routed = RoutedBlock(**vars(own), own=records)
        if beside is None:
            return x_BLD, routed
        selected = {"indices_BK": beside.indices_BK, "valid_BK": beside.valid_BK}
        return x_BLD, replace(routed, extra=beside.record, **selected)

    def _process(
        self,
        x_BLD: jax.Array,
        per_position: tuple[Any, ...],
        pairwise: Mapping[str, Any],
        whole: Mapping[str, Any],
        selection: Selection,
    ) -> tuple[jax.Array, Inside | None]:
        """Returns the new x_BLD, and what `inner` returned beside x, for a selection."""
        selected, padded = (selection.indices_BK, selection.valid_BK), selection.padded
        x_BKD, *others = gather((x_BLD, *per_position), selection.indices_BK, padded=padded)
        pairs = jax.tree.map(lambda leaf: _gather_pairs(leaf, selection), dict(pairwise))
        x_BKD = constrain_stream(x_BKD)
        out = self.inner(x_BKD, *others, **pairs, **whole)  # type: ignore[operator]
        y_BKD, extra = _split_output(out, self.output)
        shape = getattr(y_BKD, "shape", type(y_BKD))
        need = f"must return x with the shape {x_BKD.shape} that it got"
        require(shape == x_BKD.shape, "inner", shape, need)
        for leaf in jax.tree.leaves(extra):
            need = "must return arrays and numbers beside x, nothing else"
            require(isinstance(leaf, get_args(ArrayLike)), "inner", leaf, need)
        update_BKD = self.update(selection.scores_BK, x_BKD, y_BKD)
        beside = None if extra is None else Inside(inside(extra, *selected), *selected)
        return scatter_add(x_BLD, selection.indices_BK, update_BKD, padded=padded), beside

    def _warn_unmeasured(self, routing: str) -> None:
        """Warns, when the program runs, if it selects by a threshold that is still 0."""
        # Training programs call no host: jax would keep them out of its compilation cache.
        name, rule = ("", "") if routing == "trained" else self.decider(routing)
        if name != "threshold":
            return
        threshold = jax.lax.stop_gradient(read(self.rules()[rule].threshold))[0]
        if isinstance(threshold, Tracer):
            # The condition spares a program whose threshold is measured the call to the host.
            warn = functools.partial(jax.debug.callback, _warn_of_zero, threshold)
            jax.lax.cond(threshold == 0, warn, lambda: None)
        else:
            _warn_of_zero(threshold)


def _split_output(out: Any, key: str) -> tuple[Any, Any]:
    """Returns x and everything else that an inner block returned, or None."""
    if isinstance(out, Mapping):
        need = f"must have the key {key!r}, for x: see MoDBlock's `output`"
        require(key in out, "inner", sorted(map(str, out)), need)
        return out[key], {name: value for name, value in out.items() if name != key} or None
    if not isinstance(out, tuple | list):
        return out, None
    if not out:
        raise InputError("inner", out, "must begin with x")
    if hasattr(out, "_replace"):
        return out[0], out._replace(**{out._fields[0]: None})  # type: ignore[union-attr]
    return out[0], tuple(out[1:]) or None


def _check_inputs(
    per_position: tuple[Any, ...], pairwise: Mapping[str, Any], batch: int, length: int
) -> None:
    """Raises InputError for an array without the batch and position dims to gather along."""

    def check(field: str, tree: Any, dims: slice, gathered: tuple[int, ...], need: str) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shape, name = jnp.shape(leaf), f"{field}{jax.tree_util.keystr(path)}"
            fits = shape[:1] in ((1,), (batch,)) and shape[dims] == gathered
            require(fits, name, shape, f"must have the shape ({batch} or 1, {need}")

    need = "to be gathered like x; pass an array of another shape in `pairwise` or `whole`"
    check("per_position", per_position, slice(1, 2), (length,), f"{length}, ...) {need}")
    need = "pass an array that is not to be gathered in `whole`"
    pairs = f"heads or 1, {length}, {length}); {need}"
    check("pairwise", pairwise, slice(2, None), (length, length), pairs)


def _gather_pairs(x_BNLL: jax.Array, selection: Selection) -> jax.Array:
    """Returns the entries of (B or 1, N, L, L) between selected positions, (B, N, K, K).

    An entry that is not valid sees only itself, so that every softmax has a key. No other sees it.
    """

    def one(x_NLL: jax.Array, indices_K: jax.Array) -> jax.Array:
        pairs = x_NLL.at[:, indices_K[:, None], indices_K[None]]
        return pairs.get(mode="fill", fill_value=0)

    shared, indices_BK = x_BNLL.shape[0] == 1, selection.indices_BK
    x_BNKK = jax.vmap(one, (None if shared else 0, 0))(x_BNLL[0] if shared else x_BNLL, indices_BK)
    itself_1KK = jnp.eye(selection.valid_BK.shape[1], dtype=bool)[None]
    alone_BKK = itself_1KK & ~selection.valid_BK[:, :, None]
    return jnp.where(alone_BKK[:, None], jnp.ones((), x_BNKK.dtype), x_BNKK)


def _warn_of_zero(threshold: jax.Array) -> None:
    if threshold == 0:
        said = "a MoDBlock selects by a threshold that was never measured: call modjax.observe "
        warnings.warn(said + "after every update, and use what it returns", stacklevel=2)
