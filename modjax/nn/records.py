"""Typed reports of layers, which know their own losses, statistics and measured numbers.

Every array of a record begins with the batch. The stack adds a dim of repetitions before it, and
the functions below map over that dim by `jax.vmap`.

Legend: B batch, L positions, K selected positions, A layers of one kind, X numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from modjax.errors import InputError, require
from modjax.nn.routing.selection import gather

# A running mean forgets at this rate. Over the first 1 / RATE updates it is the plain mean.
RATE = 0.01
REMEDY = "set stacked=True for layers under nnx.scan"


class TokenLoss(NamedTuple):
    """The loss of every position in nats, and its weight in the objective; None means 1."""

    nll_BL: jax.Array
    weights_BL: jax.Array | None = None


class Record:
    """Base class of layer reports. Every method has a neutral default."""

    def loss(
        self, tokens: TokenLoss | None = None, totals: Mapping[str, Any] | None = None
    ) -> jax.Array:
        """Returns the layer's own term of the objective, which may depend on each position's loss.

        totals: sums over the whole batch, see `totals`; None means the sums of this record. For an
          accumulated batch, the terms of its parts are averaged.
        """
        return jnp.float32(0)

    def totals(self) -> dict[str, jax.Array]:
        """Returns the sums over the batch that the loss needs, of fixed shapes, without gradient.

        For an accumulated batch, `loss` gets their mean, at the cost of one more forward pass.
        """
        return {}

    def observed(
        self, measured: Mapping[str, Any], updates: jax.Array, tokens: TokenLoss | None = None
    ) -> dict[str, Any]:
        """Returns the module's measured numbers after one more update. updates: earlier updates."""
        return {}

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns scalars for a line of metrics.

        records: all records of this type by the path of their module, stacked over repetitions.
        """
        return {}

    def counts(self, valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Returns counts per sequence, (B,) each, for `outcome`."""
        return {}

    @classmethod
    def outcome(cls, counts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns the numbers that a run's result reports, from the `counts` of an evaluation.

        counts: `counts` by layer, (B,) each, of all layers with this type of record, or of one.
        """
        return {}

    def parts(self) -> Mapping[str, "Record"]:
        """Returns this record under "", and the records within it under their module's path."""
        return {"": self}

    @classmethod
    def together(cls, records: Mapping[str, Self]) -> Mapping[str, Self]:
        """Returns the records after each has seen the others of its type, before `observed`."""
        return records


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inside(Record):
    """The record of a layer that ran on the positions indices_BK only."""

    record: Record
    indices_BK: jax.Array
    valid_BK: jax.Array

    def loss(self, tokens=None, totals=None):
        return self.record.loss(gather(tokens, self.indices_BK), totals)

    def totals(self):
        return self.record.totals()

    def observed(self, measured, updates, tokens=None):
        return self.record.observed(measured, updates, gather(tokens, self.indices_BK))

    def counts(self, valid_BL):
        return self.record.counts(self._valid(valid_BL))

    @classmethod
    def together(cls, records):
        found = together({name: one.record for name, one in records.items()})
        return {name: replace(one, record=found[name]) for name, one in records.items()}

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns the statistics of each layer separately, as each has its own valid positions."""
        found = {}
        for name, inside in records.items():

            def one(inside: Inside, name: str = name) -> dict[str, jax.Array]:
                stacked = jax.tree.map(lambda leaf: leaf[None], inside.record)
                return statistics({name: stacked}, inside._valid(valid_BL))

            means = jax.tree.map(jnp.mean, jax.vmap(one)(inside))
            found |= {f"{name}/{key}": mean for key, mean in means.items()}
        return found

    def _valid(self, valid_BL: jax.Array) -> jax.Array:
        return self.valid_BK & gather(valid_BL, self.indices_BK)


def inside(tree: Any, indices_BK: jax.Array, valid_BK: jax.Array) -> Any:
    """Returns the tree, with every record in it wrapped as `Inside` of the selected positions."""

    def one(node: Any) -> Any:
        return Inside(node, indices_BK, valid_BK) if is_record(node) else node

    return jax.tree.map(one, tree, is_leaf=is_record)


def together(records: Mapping[str, Record]) -> dict[str, Record]:
    """Returns the records after each has seen the others of its type."""
    found: dict[str, Record] = {}
    for kind in dict.fromkeys(map(type, records.values())):
        found |= kind.together({name: r for name, r in records.items() if type(r) is kind})
    return found


def is_record(node: Any) -> bool:
    return isinstance(node, Record)


def running_mean(old_X: jax.Array, values_BX: jax.Array, updates: jax.Array) -> jax.Array:
    """Returns running means after one more batch. Values that are not finite do not count."""
    need = f"has the shape {old_X.shape}, its record {values_BX.shape[1:]}: {REMEDY}"
    require(values_BX.shape[1:] == old_X.shape, "measured", old_X.shape, need)
    rate = jnp.maximum(RATE, 1 / (updates.astype(jnp.float32) + 1))
    known_BX = jnp.isfinite(values_BX)
    total_X = jnp.sum(jnp.where(known_BX, values_BX, 0.0), axis=0)
    count_X = jnp.sum(known_BX.astype(jnp.float32), axis=0)
    mean_X = jnp.where(count_X > 0, total_X / jnp.maximum(count_X, 1.0), old_X)
    return old_X + rate * (mean_X - old_X)


def totals(records: Mapping[str, Record]) -> dict[str, Any]:
    """Returns the totals of all records that have some, by name."""
    found = {name: jax.vmap(lambda r: r.totals())(record) for name, record in records.items()}
    return {name: jax.lax.stop_gradient(sums) for name, sums in found.items() if sums}


def losses(
    records: Mapping[str, Record], tokens: TokenLoss, sums: Mapping[str, Any] | None = None
) -> jax.Array:
    """Returns the sum of all layers' own terms of the objective; records are stacked.

    sums: as `totals` returns them, or their mean over the parts of an accumulated batch. None means
      the totals of these records.
    """
    sums = totals(records) if sums is None else sums

    def one(name: str, record: Record) -> jax.Array:
        own = (sums[name],) if name in sums else ()
        return jnp.sum(jax.vmap(lambda r, *own: r.loss(tokens, *own))(record, *own))

    return sum((one(name, record) for name, record in records.items()), jnp.float32(0))


def statistics(
    records: Mapping[str, Record], valid_BL: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Returns scalars that describe one forward pass, as each type of record defines them.

    records: stacked over repetitions. valid_BL: the positions that count; None means all.
    """
    if valid_BL is None and records:
        shapes = (jnp.shape(leaf)[1:3] for leaf in jax.tree.leaves(list(records.values())))
        valid_BL = jnp.ones(next(shape for shape in shapes if len(shape) == 2), bool)
    found: dict[str, jax.Array] = {}
    for kind in dict.fromkeys(map(type, records.values())):
        mine = {name: record for name, record in records.items() if type(record) is kind}
        found |= kind.statistics(mine, valid_BL)  # type: ignore[arg-type]
    return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """The counts of a layer's record, (B, A) each. found: by name. kind: the record's type."""

    found: dict[str, Any]
    kind: type[Record] = field(metadata={"static": True})


def counts(records: Mapping[str, Record], valid_BL: jax.Array) -> dict[str, Counts]:
    """Returns the counts of each layer's record. records: stacked over repetitions."""
    each = {}
    for name, record in records.items():
        found = jax.vmap(lambda r: r.counts(valid_BL), out_axes=1)(record)
        while isinstance(record, Inside):
            record = record.record
        each |= {name: Counts(found, type(record))} if found else {}
    return each


def outcomes(found: Mapping[str, Counts]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns the outcome of all layers together, and of each layer by name, such as "1_mod.0"."""
    by_kind: dict[type[Record], dict[str, Mapping[str, np.ndarray]]] = {}
    for name, counted in found.items():
        for a in range(next(iter(counted.found.values())).shape[1]):
            one = {key: value_BA[:, a] for key, value_BA in counted.found.items()}
            by_kind.setdefault(counted.kind, {})[f"{name}.{a}"] = one
    whole: dict[str, float] = {}
    layers: dict[str, dict[str, float]] = {}
    for kind, mine in by_kind.items():
        whole |= kind.outcome(mine)
        layers |= {name: kind.outcome({name: one}) for name, one in mine.items()}
    return whole, layers


def observe(
    measured: Any,
    records: Mapping[str, Record],
    updates: int | jax.Array,
    tokens: TokenLoss | None = None,
    *,
    stacked: bool = False,
) -> tuple[Any, int]:
    """Returns the measured numbers after one more forward pass, and how many were updated.

    Call it once per update of the parameters: nothing else updates thresholds and biases.

    measured: nested like the modules: `nnx.state(model)`, a part of it, or a plain dictionary.
    records: the layers' reports by the paths of their modules, as in "layers/0/routed"; "" is the
      model itself.
    updates: the number of earlier updates.
    tokens: the loss of every position, for records that learn from it.
    stacked: whether records and numbers begin with a dim of repetitions, as under nnx.scan.

    Raises InputError for a path that does not lead to the numbers that its record measures.
    """
    paths_leaves, structure = jax.tree_util.tree_flatten_with_path(measured)
    leaves, count = [leaf for _, leaf in paths_leaves], 0
    places = {module_and_name(path): place for place, (path, _) in enumerate(paths_leaves)}

    def observed(record: Record, old: Any) -> dict[str, Any]:
        return record.observed(old, jnp.asarray(updates), tokens)

    every = {
        f"{path}/{name}".strip("/"): part
        for path, record in records.items()
        for name, part in record.parts().items()
    }
    for path, record in together(every).items():
        old = {name: leaves[place] for (module, name), place in places.items() if module == path}
        if stacked:
            firsts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((record, old))}
            need = "needs records and numbers that begin with the same dim, of repetitions"
            require(len(firsts) == 1, "stacked", stacked, need)
        try:
            new = (jax.vmap(observed) if stacked else observed)(record, old)
            shapes = {name: jnp.shape(old[name]) for name in new}
        except KeyError as missing:
            names = ", ".join(map(repr, dict.fromkeys(module for module, _ in places)))
            need = f"has no measured {missing}: must be the path of a module, one of {names}"
            raise InputError("records", path, need) from missing
        for name, value in new.items():
            number = f"{path}/{name}".lstrip("/")
            need = f"{number} has the shape {shapes[name]}, its record {value.shape}: {REMEDY}"
            require(value.shape == shapes[name], "stacked", stacked, need)
            leaves[places[path, name]] = value
            count += value.size
    return jax.tree.unflatten(structure, leaves), count


def module_and_name(path: tuple[Any, ...]) -> tuple[str, str]:
    """Returns the path of a leaf's module, and the leaf's name in it."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # an nnx.Variable's own
        path = path[:-1]
    module, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
    return module, name
