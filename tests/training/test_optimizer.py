"""The schedule and AdamW against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modjax.specs import Dense, MoD, Predictor, TrainConfig
from modjax.training.optimizer import learning_rate, make_schedule, optimizer_for
from modjax.training.state import abstract_model
from tests.training.tiny import model


def config(**changes) -> TrainConfig:
    values = dict(batch_size=2, seq_len=8, steps=50, learning_rate=0.02, warmup_steps=10)
    return TrainConfig(**(values | changes))


def numpy_learning_rate(train: TrainConfig, step: int) -> float:
    """Returns the rate of update `step`, counted from 1, by the formula of the docstring."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    share = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    floor = train.final_learning_rate_fraction
    return train.learning_rate * (floor + (1 - floor) * (1 + np.cos(np.pi * share)) / 2)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 50), (0, 7), (1, 2), (5, 5), (0, 1), (49, 50)])
@pytest.mark.parametrize("floor", [0.1, 0.0])
def test_every_step_has_the_rate_of_a_cosine_that_ends_at_the_last_step(warmup, steps, floor):
    train = config(warmup_steps=warmup, steps=steps, final_learning_rate_fraction=floor)
    ours = [float(learning_rate(make_schedule(train), jnp.int32(i))) for i in range(steps)]
    np.testing.assert_allclose(
        ours, [numpy_learning_rate(train, i + 1) for i in range(steps)], rtol=1e-5, atol=1e-8
    )
    if warmup < steps:
        assert ours[-1] == pytest.approx(0.02 * floor, abs=1e-9)
    assert all(rate > 0 for rate in ours[:-1])


ROLES = {
    "embedding": "embedding",
    "w": "weight",
    "heads": "weight",
    "scale": "norm",
    "final": "norm",
}
DECAYS = {"embedding": True, "w": True, "heads": True, "scale": False, "final": False}


def test_stacked_vectors_are_no_matrices():
    split = abstract_model(model(layers=(Dense(), MoD(causal=Predictor()))))
    vectors = {"scale", "causal/line", "causal/w_out", "router/w"}
    decays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(split.decays)
    }
    assert len(decays) == len(jax.tree.leaves(split.weights.params))
    matrices = {"w_q", "w_k", "w_v", "w_out", "w_in", "table", "w_logits"}
    assert matrices < {path.split("/")[-1] for path in decays}
    for path, decay in decays.items():
        assert decay != any(path.endswith(name) for name in vectors), path


def test_updates_equal_numpy_adamw_with_clipping_and_decay_on_matrices_only():
    train = config(steps=6, warmup_steps=2, weight_decay=0.3, clip_norm=0.7, b1=0.8, b2=0.95)
    optimizer = optimizer_for(ROLES, DECAYS, train, make_schedule(train))
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (5, 4),
        "w": (2, 4, 6),
        "heads": (2, 4, 2, 2),
        "scale": (2, 4),
        "final": (4,),
    }
    expected = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in expected.items()}
    state = optimizer.init(params)

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    first = {name: np.zeros(shape) for name, shape in shapes.items()}
    second = {name: np.zeros(shape) for name, shape in shapes.items()}
    for step in range(1, 7):
        scale = 0.01 if step % 2 else 3.0  # below and above the clipping norm
        grads = {name: scale * rng.normal(size=shape) for name, shape in shapes.items()}
        with jax.numpy_dtype_promotion("standard"):
            params, state = update(
                {name: np.asarray(g, np.float32) for name, g in grads.items()}, state, params
            )

        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        rate = numpy_learning_rate(train, step)
        for name, g in grads.items():
            g = g * min(1.0, train.clip_norm / norm)
            first[name] = train.b1 * first[name] + (1 - train.b1) * g
            second[name] = train.b2 * second[name] + (1 - train.b2) * g**2
            m, v = first[name] / (1 - train.b1**step), second[name] / (1 - train.b2**step)
            decay = train.weight_decay if name in ("embedding", "w", "heads") else 0.0
            expected[name] -= rate * (m / (np.sqrt(v) + train.eps) + decay * expected[name])
        for name in shapes:
            np.testing.assert_allclose(params[name], expected[name], rtol=2e-5, atol=2e-6)
