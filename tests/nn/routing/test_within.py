"""Work on a selection is done at its size, and reported wherever selections nest.

Legend: B batch, L positions, K selected positions.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import Inside, Routed
from modjax.nn.routing import routed_layer
from modjax.nn.routing.routing_records import Dispatched
from modjax.specs import Attention, Dense, MoD, ModelSpec, MoE, Predictor, Seq, TokenChoice
from tests.nn.small import QUICK, random_model

B, L = 2, 32
TOKENS_BL = np.random.default_rng(0).integers(0, 24, (B, L))
EXPERTS = Seq(Attention(), MoE(4, TokenChoice(no_ops=2)))
STAGED = MoD(EXPERTS, capacity=0.25, causal=Predictor())
NESTED = MoD(MoD(Dense(), capacity=0.5), capacity=0.5)
CASES = {"staged": (STAGED, "predictor"), "nested": (NESTED, "threshold")}


def model_of(layer):
    return random_model(ModelSpec(24, 16, 2, 2, 1, 32, layers=(Dense(), layer)), seed=9)


def forward(layer, routing):
    graphdef, params = model_of(layer)

    def run(params, tokens_BL):
        return nnx.merge(graphdef, params)(tokens_BL, routing=routing)

    return run, params


def counted(layer, routing):
    run, params = forward(layer, routing)
    valid_BL = jnp.ones((B, L), bool)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def counts(params, tokens_BL):
        logits_BLV, records = run(params, tokens_BL)
        each = {name: jax.vmap(lambda r: r.counts(valid_BL))(of) for name, of in records.items()}
        return logits_BLV, each

    return counts(params, TOKENS_BL)


@pytest.mark.parametrize("layer, routing", CASES.values(), ids=CASES)
def test_nothing_depends_on_the_size_that_was_compiled(layer, routing, monkeypatch):
    logits_BLV, found = counted(layer, routing)
    assert any(0 < count.sum() for of in found.values() for count in of.values())
    monkeypatch.setattr(routed_layer, "_buckets", lambda k, bound: [bound])
    whole_BLV, expected = counted(layer, routing)
    np.testing.assert_allclose(logits_BLV, whole_BLV, atol=2e-5)
    for name, of in expected.items():
        for key, count_GB in of.items():
            if key != "computed":  # empty slots among them
                np.testing.assert_array_equal(found[name][key], count_GB)


@pytest.mark.parametrize("layer, routing", CASES.values(), ids=CASES)
def test_the_depth_counts_every_selection_also_where_they_nest(layer, routing):
    run, params = forward(layer, routing)
    _, records = jax.jit(run, compiler_options=QUICK)(params, TOKENS_BL)
    expected_BL = np.zeros((B, L), int)
    for record in records.values():
        record = jax.tree.map(lambda leaf: np.asarray(leaf[0]), record)
        inner = record.record if isinstance(record, Inside) else record
        if not isinstance(inner, Routed | Dispatched):
            continue
        took = inner.selected_BL if isinstance(inner, Routed) else inner.taken_BL > 0
        if isinstance(record, Inside):
            rows, places = np.nonzero(took & record.valid_BK)
            np.add.at(expected_BL, (rows, record.indices_BK[rows, places]), 1)
        else:
            expected_BL += took
    graphdef, _ = model_of(layer)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read(params, tokens_BL):
        read = nnx.merge(graphdef, params).reader(max_length=L, routing=routing)
        _, cache, prompt_BL = read(tokens_BL[:, :-4], jnp.full(B, L - 4), None)
        depths_BL = [prompt_BL]
        for place in range(L - 4, L):
            _, cache, depth_B1 = read(tokens_BL[:, place : place + 1], jnp.ones(B, int), cache)
            depths_BL.append(depth_B1)
        return jnp.concatenate(depths_BL, axis=1)

    np.testing.assert_array_equal(read(params, TOKENS_BL), expected_BL)
    assert expected_BL.max() == 2 and len(np.unique(expected_BL)) == 3


def products(jaxpr) -> int:
    """Returns the multiply-adds of all products in a jaxpr, the largest branch of each cond."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contract)
        elif eqn.primitive.name == "cond":
            total += max(products(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            inner = eqn.params.get("jaxpr")
            total += 0 if inner is None else products(getattr(inner, "jaxpr", inner))
    return total


def branches(jaxpr) -> list[list[int]]:
    """Returns the multiply-adds of each branch of every cond, outermost ones."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            found.append([products(branch.jaxpr) for branch in eqn.params["branches"]])
        elif (inner := eqn.params.get("jaxpr")) is not None:
            found += branches(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("layer", [STAGED, MoD(Dense(), capacity=0.25, causal=Predictor())])
def test_a_layer_inside_is_computed_for_as_many_positions_as_ask(layer):
    run, params = forward(layer, "predictor")
    (sizes,) = branches(jax.make_jaxpr(run)(params, TOKENS_BL).jaxpr)
    assert len(sizes) == 3 and sizes == sorted(sizes)
    assert sizes[0] <= 1.05 * 1.5 * 0.25 * sizes[-1]
