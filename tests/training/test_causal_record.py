"""The causal loss in a run's record for each kind of layer, and the loss that compares arms.

Legend: B sequences, L positions, T positions whose future is hidden, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax.data.token_cache import cache_dir, open_cache
from modjax.nn.layers.attention import Attention as AttentionModule
from modjax.records import causal_loss, causal_routing, run_dir
from modjax.scaling.fit.comparable_runs import under, with_loss
from modjax.specs import (
    MLP,
    Attention,
    Binary,
    Dense,
    Execution,
    ExpertChoice,
    ExpertThreshold,
    MoD,
    MoE,
    Positional,
    Predictor,
    Random,
    Received,
    Seq,
    SequenceAltUp,
    Threshold,
    TopK,
)
from modjax.training.loop import train
from modjax.training.mesh import make_mesh
from modjax.training.results.clock import Clock
from modjax.training.results.evaluate import validation_batches
from modjax.training.results.run_record import make_record
from modjax.training.step import EVAL_STREAM, stream_key
from tests.conftest import TINY_DATA
from tests.outside.strided import Strided
from tests.training.tiny import run_spec


@dataclasses.dataclass(frozen=True)
class Balanced(Attention):
    """Attention from outside that claims to look ahead; its costs are those of plain attention."""

    def looks_ahead(self, routing):
        return True


class BalancedModule(AttentionModule):
    def __call__(self, x_BLD, at, call, cache=None):
        out = super().__call__(x_BLD, at, call, cache)
        return out._replace(x=out.x + jnp.mean(x_BLD, axis=1, keepdims=True))


@pytest.fixture(autouse=True)
def registered(own_layers):
    modjax.register(Balanced, BalancedModule)


KINDS = {
    "dense": ((Dense(),), "trained"),
    "every fourth position": ((SequenceAltUp(Dense(), stride=4),), "trained"),
    "from outside": ((Strided(Dense(), stride=4),), "trained"),
    "MoD with a predictor": ((Dense(), MoD(capacity=0.25, causal=Predictor())), "predictor"),
    "MoD with the auxiliary loss": ((MoD(capacity=0.25, rule=TopK(auxiliary=0.1)),), "auxiliary"),
    "MoD without": ((Dense(), MoD(capacity=0.25)), "threshold"),
    "MoD at random": ((Dense(), MoD(capacity=0.25, rule=Random())), "threshold"),
    "MoD by position": ((Dense(), MoD(capacity=0.25, rule=Positional())), "positional"),
    "token choice": ((Dense(), MoD(capacity=0.25, rule=Binary())), "binary"),
    "a threshold": ((Dense(), MoD(capacity=0.25, rule=Threshold())), "threshold"),
    "MoE that drops": ((Seq(Attention(), MoE(4, capacity_factor=0.5)),), "token_choice"),
    "MoE by thresholds": ((Seq(Attention(), MoE(4, ExpertThreshold(2))),), "expert_threshold"),
    "staged": (
        (MoD(Seq(Attention(), MoE(4)), capacity=0.5, causal=Predictor()),),
        "predictor, token_choice",
    ),
    "rules of their own": (
        (MoD(capacity=0.5, causal=Predictor()), MoD(capacity=0.5, rule=Positional())),
        "positional, predictor",
    ),
    "expert choice": ((Seq(Attention(), MoE(4, ExpertChoice())),), None),
    "expert choice within MoD": (
        (MoD(Seq(Attention(), MoE(4, ExpertChoice())), causal=Predictor()),),
        None,
    ),
    "attention received": (
        (
            Seq(
                Attention(received=True),
                MoD(MLP(), capacity=0.25, router=Received(), rule=TopK(weight="one")),
            ),
        ),
        None,
    ),
    "from outside, looking ahead": ((Seq(Balanced(), MLP()),), None),
}
DROPS_OR_SELECTS = {"MoD with a predictor", "MoD without", "MoE that drops", "MoD at random"}


@pytest.mark.parametrize(
    "evaluation", [{"eval_loss": 2.5, "eval_loss_sem": 0.1}, {}], ids=["done", "diverged"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_says_by_which_routing_its_model_never_looks_ahead(
    kind, evaluation, tiny_data_dir
):
    layers, routing = KINDS[kind]
    measured = {} if routing in ("trained", None) or not evaluation else {"causal_loss": 2.75}
    record = make_record(
        run_spec(layers=layers),
        open_cache(cache_dir(tiny_data_dir, TINY_DATA)),
        Clock(),
        diverged_step=0 if evaluation else 3,
        train_loss=2.0,
        found=evaluation | measured,
        device="cpu",
        eval_batch_size=8,
        provenance={},
    )
    assert causal_routing(record) == routing
    wanted = {"trained": 2.5, None: None}.get(routing, 2.75)
    assert causal_loss(record) == (wanted if evaluation else None)
    if evaluation and routing is not None:
        (compared,) = under([record], "causal").records
        assert compared.eval_loss == wanted and compared.status == "finished"
    if evaluation and routing is None:
        dense = dataclasses.replace(record, variant="dense", run_id="d", causal_routing="trained")
        compared, without = under([record, dense], "causal")
        assert compared == [dense] and without == [record]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_loss_is_that_of_a_model_from_which_the_future_is_hidden(
    kind, tiny_data_dir, tmp_path
):
    """A prediction at t may depend on tokens up to t. All others are drawn at random, t by t."""
    layers, routing = KINDS[kind]
    spec = run_spec(layers=layers, eval_sequences=8)
    folder = run_dir(tmp_path, spec.run_id)
    jax.config.update("jax_disable_most_optimizations", True)
    record = train(spec, Execution(data=1), run_dir=folder, data_dir=tiny_data_dir)
    found = modjax.load(folder)
    cache = open_cache(cache_dir(tiny_data_dir, TINY_DATA))
    (batch,) = validation_batches(cache, spec.train, make_mesh(Execution(data=1)))
    key = stream_key(jnp.int32(spec.train.seed), EVAL_STREAM, jnp.int32(0))
    noise_BL = np.random.default_rng(0).integers(3, 250, batch.inputs_BL.shape, dtype=np.int32)
    length = noise_BL.shape[1]
    called = "trained" if routing in ("trained", None) else "causal"

    @jax.jit
    def hidden(weights):
        model = nnx.merge(found.graphdef, weights)

        def at(t):
            known_L = jnp.arange(length) <= t
            tokens_BL = jnp.where(known_L[None], batch.inputs_BL, noise_BL)
            return model(tokens_BL, key=key, routing=called)[0][:, t]

        return jax.lax.map(at, jnp.arange(length))

    logits_BLV = np.float64(hidden(found.weights)).swapaxes(0, 1)
    jax.config.update("jax_disable_most_optimizations", False)
    logits_BLV -= logits_BLV.max(axis=2, keepdims=True)
    picked_BL = np.take_along_axis(logits_BLV, batch.targets_BL[..., None], axis=2)[..., 0]
    loss = np.mean(np.log(np.exp(logits_BLV).sum(axis=2)) - picked_BL)
    if routing is None:
        assert abs(loss - record.eval_loss) > 1e-4, "as trained, it does look ahead"
        assert causal_loss(record) is None
        return
    assert causal_loss(record) == pytest.approx(loss, rel=1e-5)
    assert with_loss(record, "causal").eval_loss == causal_loss(record)
    if kind in DROPS_OR_SELECTS:
        assert abs(record.eval_loss - loss) > 1e-4, "as trained, the loss is another"
