"""Cross-entropy against optax, in values and gradients.

Legend: B batch, L positions, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from modjax.kernels import cross_entropy


def test_values_and_gradients_are_those_of_optax():
    rng = np.random.default_rng(0)
    logits_BLV = jnp.asarray(rng.normal(0, 5, (2, 3, 17)), jnp.float32)
    targets_BL = jnp.asarray(rng.integers(0, 17, (2, 3)), jnp.int32)
    weights_BL = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def result(loss):
        def total(logits_BLV):
            loss_BL = loss(logits_BLV, targets_BL)
            return jnp.sum(loss_BL * weights_BL), loss_BL

        return jax.value_and_grad(total, has_aux=True)(logits_BLV)

    ours = result(cross_entropy)
    theirs = result(optax.softmax_cross_entropy_with_integer_labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_logits_of_any_size_give_finite_values_and_gradients():
    logits_11V = jnp.array([[[1e30, -1e30, 0.0]]])
    loss, gradient = jax.value_and_grad(lambda z: cross_entropy(z, jnp.array([[0]]))[0, 0])(
        logits_11V
    )
    assert loss == 0 and not np.any(gradient)
