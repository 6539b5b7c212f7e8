"""The examples of the README run as printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import modjax

README = Path(__file__).parents[1] / "README.md"


class YourBlock(nnx.Module):
    """Adds to each position one more than twice its index."""

    def __init__(self, width, *, rngs):
        self.one = nnx.Param(jnp.ones(width))

    def __call__(self, x_BLD, positions_BL):
        return x_BLD + 2 * positions_BL.astype(x_BLD.dtype)[..., None] + self.one[...][None, None]


class Recorder(nnx.Module):
    """Stores its arguments."""

    def __call__(self, x_BLD, *, mask, memory):
        self.mask, self.memory = np.asarray(mask), np.asarray(memory)
        return x_BLD


def test_the_routed_block_of_the_readme_runs_and_routes_an_eighth():
    section = README.read_text().split("## A routed block in your model")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    namespace = {"YourBlock": YourBlock}
    exec(compile(code, str(README), "exec"), namespace)
    model = namespace["YourModel"](nnx.Rngs(0))

    x = jax.random.normal(jax.random.key(0), (2, 32, 512))
    positions = jnp.arange(32)[None]
    y, loss = model(x, positions)
    update = np.asarray(y - x)
    score = np.asarray(x) @ np.asarray(model.routed.router.w[..., 0])
    taken = np.argsort(np.argsort(-score)) < 4
    expected = np.where(taken, score * (2 * np.arange(32) + 1), 0)[..., None]
    np.testing.assert_allclose(update, np.broadcast_to(expected, x.shape), rtol=1e-3, atol=1e-4)

    routed = model.routed(x, positions)[1]
    named = re.findall(r"\.(\w+)", code.split("objective;")[1])
    assert len(named) == 2 and all(hasattr(routed, name) for name in named)
    np.testing.assert_array_equal(routed.selected_BL, taken)
    # The predictor's binary cross-entropy, from its odds of each position's being taken.
    odds = 1 / (1 + np.exp(-np.asarray(routed.own["causal"].logits_BL, np.float64)))
    np.testing.assert_allclose(loss, -np.log(np.where(taken, odds, 1 - odds)).mean(), rtol=1e-5)


def test_the_keyword_arguments_of_the_readme_reach_the_block():
    section = README.read_text().split("## A routed block in your model")[1].split("##")[0]
    assert '`pairwise={"mask": mask}`' in section and '`whole={"memory": memory}`' in section
    block = modjax.MoDBlock(Recorder(), 8, modjax.MoDConfig(capacity=0.5), rngs=nnx.Rngs(0))
    mask, memory = nnx.make_causal_mask(jnp.zeros((2, 6))), jnp.ones((2, 5, 8))
    block(jnp.ones((2, 6, 8)), pairwise={"mask": mask}, whole={"memory": memory})
    np.testing.assert_array_equal(block.inner.mask, np.tile(np.tri(3), (2, 1, 1, 1)))
    np.testing.assert_array_equal(block.inner.memory, memory)


def test_the_layer_of_the_readme_is_the_one_that_is_tested():
    code = README.read_text().split("## Layers are values")[1].split("```python\n")[1]
    assert code.split("```")[0] in (README.parent / "tests/outside/strided.py").read_text()


def test_the_layers_of_the_readme_are_read():
    section = README.read_text().split("## Layers are values")[1].split("A layer of your own")[0]
    lines = re.findall(r"^    (.*)$", section, re.MULTILINE)
    assert len(lines) == 9
    for line in lines:
        named = re.search(r'model.streams = "(.*)"', line)
        streams = named and named.group(1)
        found = [
            modjax.ModelSpec(272, 64, 4, 4, 4, 256, layers=text, streams=streams).layers
            for text in (line.partition("#")[0], line.partition("#")[0].replace("0.125", "0.25"))
        ]
        assert (found[0] != found[1]) == ("0.125" in line)


def test_a_finished_run_opens_in_the_lines_of_the_readme(finished_workdir):
    code = README.read_text().split("opened in Python:\n\n```python\n")[1].split("```")[0]
    (folder,) = (finished_workdir / "runs").iterdir()
    namespace = {}
    exec(code.replace("work/tiny/runs/RUN_ID", str(folder)), namespace)
    assert namespace["logits_BLV"].shape == (1, 3, namespace["run"].spec.model.vocab_size)
    assert set(namespace["records"]) == {"1_mod", "1_mod/causal", "1_mod/rule"}


def test_the_sampling_example_of_the_readme_continues_two_prompts():
    section = README.read_text().split("## Sampling")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    namespace = {}
    exec(compile(code, str(README), "exec"), namespace)
    more = namespace["more"]
    assert more.tokens_BO.shape == more.depths_BO.shape == (2, 20)
    np.testing.assert_array_equal(more.state.cache.positions_B, [3 + 40, 4 + 40])
    assert 0 <= int(more.depths_BO.min()) <= int(more.depths_BO.max()) <= 2
