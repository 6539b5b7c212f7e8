"""What layers report: typed records that know their own losses, statistics and observations.

Every array of a record begins with the batch. The stack adds the repetitions of a layer before it;
`jax.vmap` takes them away again.

Legend: B batch, L positions, K selected positions, G repetitions of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from modjax.nn.routing import gather

# A running mean forgets at this rate; until then it is the plain mean.
RATE = 0.01


class Record:
    """Base class of layer reports. Every method has a neutral default."""

    def loss(self, nll_BL: jax.Array) -> jax.Array:
        """Returns what the layer adds to the objective; it may look at the loss of every position.

        Accumulated batches take the mean of it over their parts. A record that declares `totals`
        is called with them as a second argument.
        """
        return jnp.float32(0)

    def totals(self) -> dict[str, jax.Array]:
        """Returns the sums over the batch that the loss needs, of fixed shapes; {} for none.

        Of an accumulated batch, `loss` gets their mean over the parts, for which an update takes a
        forward pass more. No gradient passes.
        """
        return {}

    def observed(self, measured: Mapping[str, Any], updates: jax.Array) -> dict[str, Any]:
        """New values of what the layer measures, after `updates` earlier ones."""
        return {}

    def used(self) -> jax.Array | None:
        """Which positions the layer processed, (B, L); None: all."""
        return None

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Scalars for a line of metrics, of all records of this type, stacked over repetitions."""
        return {}

    def counts(self, valid_BL: jax.Array) -> dict[str, jax.Array]:
        """Per sequence, (B,), what an evaluation is to sum over all of them."""
        return {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inside(Record):
    """The record of a layer inside a selection: of positions indices_BK only."""

    record: Record
    indices_BK: jax.Array
    valid_BK: jax.Array

    def loss(self, nll_BL: jax.Array, *totals: Any) -> jax.Array:
        return self.record.loss(gather(nll_BL, self.indices_BK), *totals)

    def totals(self) -> dict[str, jax.Array]:
        return self.record.totals()

    def observed(self, measured: Mapping[str, Any], updates: jax.Array) -> dict[str, Any]:
        return self.record.observed(measured, updates)

    def counts(self, valid_BL: jax.Array) -> dict[str, jax.Array]:
        return self.record.counts(self.valid_BK & gather(valid_BL, self.indices_BK))

    @classmethod
    def statistics(cls, records: Mapping[str, Self], valid_BL: jax.Array) -> dict[str, jax.Array]:
        found = {}
        for name, inside in records.items():

            def one(inside: Inside, name: str = name) -> dict[str, jax.Array]:
                valid_BK = inside.valid_BK & gather(valid_BL, inside.indices_BK)
                stacked = jax.tree.map(lambda leaf: leaf[None], inside.record)
                return type(inside.record).statistics({name: stacked}, valid_BK)

            means = jax.tree.map(jnp.mean, jax.vmap(one)(inside))
            found |= {f"{name}/{key}": mean for key, mean in means.items()}
        return found


def running_mean(old_N: jax.Array, values_BN: jax.Array, updates: jax.Array) -> jax.Array:
    """What the old means are after one more batch of values, of which the finite ones count."""
    rate = jnp.maximum(RATE, 1 / (updates.astype(jnp.float32) + 1))
    known_BN = jnp.isfinite(values_BN)
    total_N = jnp.sum(jnp.where(known_BN, values_BN, 0.0), axis=0)
    count_N = jnp.sum(known_BN.astype(jnp.float32), axis=0)
    mean_N = jnp.where(count_N > 0, total_N / jnp.maximum(count_N, 1.0), old_N)
    return old_N + rate * (mean_N - old_N)


def totals(records: Mapping[str, Record]) -> dict[str, Any]:
    """Returns the totals of the records that declare some, by their names."""
    found = {name: jax.vmap(lambda r: r.totals())(record) for name, record in records.items()}
    return {name: jax.lax.stop_gradient(sums) for name, sums in found.items() if sums}


def losses(
    records: Mapping[str, Record], nll_BL: jax.Array, sums: Mapping[str, Any] | None = None
) -> jax.Array:
    """Returns what all layers add to the objective; records are stacked over repetitions.

    sums: as `totals` has them, or their mean over the parts of a batch that these are one of;
      None, those of these records.
    """
    sums = totals(records) if sums is None else sums

    def one(name: str, record: Record) -> jax.Array:
        own = (sums[name],) if name in sums else ()
        return jnp.sum(jax.vmap(lambda r, *own: r.loss(nll_BL, *own))(record, *own))

    return sum((one(name, record) for name, record in records.items()), jnp.float32(0))


def statistics(
    records: Mapping[str, Record], valid_BL: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Scalars that describe one forward pass, over its valid positions; {} where nothing reports.

    Each type of record says what they are.
    """
    found: dict[str, jax.Array] = {}
    for kind in dict.fromkeys(map(type, records.values())):
        mine = {name: record for name, record in records.items() if type(record) is kind}
        if valid_BL is None:
            batch, length = jax.tree.leaves(next(iter(mine.values())))[0].shape[1:3]
            valid = jnp.ones((batch, length), bool)
        else:
            valid = valid_BL
        found |= kind.statistics(mine, valid)
    return found


def observe(measured: Any, records: Mapping[str, Record], updates: jax.Array) -> Any:
    """The measured numbers of a model's blocks after one more forward pass.

    measured: nested like the modules, of which a record's name is the path.
    """
    for name, record in records.items():
        measured = _at_path(measured, name.split("/"), record, updates)
    return measured


def _at_path(tree: Any, path: list[str], record: Record, updates: jax.Array) -> Any:
    if not isinstance(tree, Mapping) or not path:
        if not tree:
            return tree
        return {**tree, **jax.vmap(lambda r, old: r.observed(old, updates))(record, tree)}
    if path[0] not in tree:  # nothing is measured there
        return tree
    return {**tree, path[0]: _at_path(tree[path[0]], path[1:], record, updates)}
