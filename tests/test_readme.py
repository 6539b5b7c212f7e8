"""The README's example runs as printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

README = Path(__file__).parents[1] / "README.md"


class YourBlock(nnx.Module):
    """Adds to every position twice its own number, plus one."""

    def __init__(self, width, *, rngs):
        self.one = nnx.Param(jnp.ones(width))

    def __call__(self, x_BLD, positions_BL):
        return x_BLD + 2 * positions_BL.astype(x_BLD.dtype)[..., None] + self.one[...][None, None]


def test_the_routed_block_of_the_readme_runs_and_routes_an_eighth():
    section = README.read_text().split("## A routed block in your model")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    namespace = {"YourBlock": YourBlock}
    exec(compile(code, str(README), "exec"), namespace)
    model = namespace["YourModel"](nnx.Rngs(0))

    x = jax.random.normal(jax.random.key(0), (2, 32, 512))
    positions = jnp.arange(32)[None]
    update = np.asarray(model(x, positions) - x)
    score = np.asarray(x) @ np.asarray(model.routed.router.w[...])
    taken = np.argsort(np.argsort(-score)) < 4
    expected = np.where(taken, score * (2 * np.arange(32) + 1), 0)[..., None]
    np.testing.assert_allclose(update, np.broadcast_to(expected, x.shape), rtol=1e-3, atol=1e-4)

    aux = model.routed(x, positions)[1]
    named = re.findall(r'"(\w+)"', code.split("# aux:")[1])
    assert len(named) == 3 and set(named) <= set(aux)
    np.testing.assert_array_equal(aux["selected_BL"], taken)


def test_the_sampling_example_of_the_readme_continues_two_prompts():
    section = README.read_text().split("## Sampling")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    namespace = {}
    exec(compile(code, str(README), "exec"), namespace)
    more = namespace["more"]
    assert more.tokens_BN.shape == more.depths_BN.shape == (2, 20)
    np.testing.assert_array_equal(more.state.cache.positions_B, [3 + 40, 4 + 40])
    assert 0 <= int(more.depths_BN.min()) <= int(more.depths_BN.max()) <= 2
