"""Pretrained models against transformers: logits, gradients, cached decoding and files, both ways.

Legend: B batch, L positions, V vocabulary.
"""

import dataclasses
import functools
import json
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import modjax
from modjax.specs import Execution
from modjax.training.mesh import make_mesh
from tests.nn.small import QUICK
from tests.pretrained.models import hf_models
from tests.pretrained.models.cases import CASES
from tests.pretrained.models.numpy_decoder import decode
from tests.pretrained.models.small_models import FAMILIES, FULL, SLIDING, shapes, tokens

# Looked for, not imported: importing both takes 5 s, also where no test here is selected.
missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason="make test-parity")]
CLOSE = 2e-5  # the logits of all models have a standard deviation of about 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a function from a case's name to its folder and its torch model."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("model")
        model = hf_models.make(CASES[name])
        hf_models.save(CASES[name], model, folder)
        return folder, model

    return make


def ours(found, tokens_BL):
    """Returns the logits, those of decoding token by token, and the gradients of the mean loss."""

    def logits(weights):
        return nnx.merge(found.graphdef, weights)(tokens_BL)[0]

    def loss(weights):
        logits_BLV = logits(weights)
        chosen_BL1 = jnp.take_along_axis(
            jax.nn.log_softmax(logits_BLV[:, :-1]), tokens_BL[:, 1:, None], axis=-1
        )
        return -jnp.mean(chosen_BL1), logits_BLV

    def decoded(weights):
        batch, length = tokens_BL.shape
        read = nnx.merge(found.graphdef, weights).reader(max_length=length, routing="causal")
        ones_B = jnp.ones(batch, int)
        first_BV, cache, _ = read(tokens_BL[:, :1], ones_B, None)

        def one(cache, tokens_B):
            logits_BV, cache, _ = read(tokens_B[:, None], ones_B, cache)
            return cache, logits_BV

        _, later_LBV = jax.lax.scan(one, cache, tokens_BL[:, 1:].T)
        return jnp.concatenate([first_BV[None], later_LBV]).swapaxes(0, 1)

    def run(weights):
        grads, logits_BLV = jax.grad(loss, has_aux=True)(weights)
        return logits_BLV, decoded(weights), grads

    return jax.device_get(jax.jit(run, compiler_options=QUICK)(found.weights))


def tensors(folder):
    """Returns the tensors of all safetensors files of a folder, by name."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def become_gradients(model, tokens_BL):
    """Replaces the weights of a torch model by the gradients of the mean loss."""
    import torch

    given = torch.tensor(tokens_BL, dtype=torch.long)
    logits_BLV = model(given, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), given[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, made, tmp_path):
    case = CASES[name]
    folder, model = made(name)
    tokens_BL = tokens(case)
    expected_BLV = hf_models.logits(model, tokens_BL)
    assert 0.8 < np.std(expected_BLV) < 1.3
    found = modjax.from_pretrained(folder, dtype="float32")
    logits_BLV, decoded_BLV, grads = ours(found, tokens_BL)
    np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(decoded_BLV, logits_BLV, rtol=0, atol=CLOSE)
    # Both write their gradients as a model's weights, so that their names and layouts are equal.
    become_gradients(model := hf_models.make(case), tokens_BL)
    hf_models.save(dataclasses.replace(case, dtype="float32"), model, tmp_path / "theirs")
    modjax.save_pretrained(tmp_path / "ours", found.spec, grads, config=found.config)
    theirs, written = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert {case.prefix + tensor for tensor in written} == theirs.keys()
    sizes = {tensor: np.max(np.abs(theirs[case.prefix + tensor])) for tensor in written}
    for tensor, grad in written.items():
        expected, bound = theirs[case.prefix + tensor], 1e-4 * sizes[tensor] + 1e-7
        np.testing.assert_allclose(grad, expected, rtol=0, atol=bound, err_msg=tensor)
    # All but experts that no token chooses, and biases of keys that do not turn.
    assert np.mean([size > 1e-5 for size in sizes.values()]) > 0.9


@pytest.mark.parametrize("name", CASES)
def test_files_come_back_with_equal_bytes_and_logits(name, made, tmp_path):
    case = CASES[name]
    folder, model = made(name)
    found = modjax.from_pretrained(folder)
    assert found.spec.dtype == ("bfloat16" if case.dtype == "bfloat16" else "float32")
    out, options = tmp_path / "out", {"config": found.config, "dtype": case.dtype}
    modjax.save_pretrained(out, found.spec, found.weights, **options)
    before, after = tensors(folder), tensors(out)
    assert {case.prefix + tensor for tensor in after} == before.keys()
    for tensor, value in after.items():
        expected = before[case.prefix + tensor]
        assert value.dtype == expected.dtype and value.tobytes() == expected.tobytes(), tensor
    expected_BLV = hf_models.logits(model, tokens(case))
    np.testing.assert_array_equal(hf_models.logits(reloaded(out), tokens(case)), expected_BLV)
    check_both_forms(json.loads((out / "config.json").read_text()))
    # And a second time: what modjax writes, it reads.
    twice = modjax.from_pretrained(out)
    width = found.spec.shape.head_dim
    assert twice.spec == dataclasses.replace(found.spec, head_dim=width)
    same = jax.tree.map(np.array_equal, twice.weights, found.weights)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == "float32"])
def test_the_spec_alone_says_the_family(name, made, tmp_path):
    """Another family than the file's may compute the same, with its tensors in another form."""
    case = CASES[name]
    folder, model = made(name)
    found = modjax.from_pretrained(folder)
    modjax.save_pretrained(tmp_path / "out", found.spec, found.weights)
    expected_BLV = hf_models.logits(model, tokens(case))
    logits_BLV = hf_models.logits(reloaded(tmp_path / "out"), tokens(case))
    np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=CLOSE)


def reloaded(folder):
    """Returns the model that transformers reads from a folder."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": "float32", "attn_implementation": "eager", "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.values()), info
    return model.eval()


def check_both_forms(config):
    """Checks that the rotary fields of both forms agree, without what each leaves out."""
    new, scaling = config["rope_parameters"], config["rope_scaling"]
    if FULL in new:
        assert config["rope_local_base_freq"] == new[SLIDING]["rope_theta"]
        assert new[SLIDING]["rope_type"] == "default"
        new = new[FULL]
    assert config["rope_theta"] == new["rope_theta"]
    outside = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
    said = {name: value for name, value in new.items() if name not in outside}
    if new["rope_type"] == "default":
        assert scaling is None
        return
    assert new["rope_type"] == scaling.get("rope_type", scaling.get("type"))
    given = {name: value for name, value in scaling.items() if name not in outside}
    context = "original_max_position_embeddings"
    if context in config:
        given[context] = config[context]
    assert given == said


@pytest.mark.parametrize("name", ["gemma, bfloat16", "gemma3, nested, old"])
def test_embeddings_in_bfloat16_equal_bit_for_bit(name, made, tmp_path):
    """Holds for their scale, which is rounded to bfloat16 first: logits would not show it."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, _ = made(name)
    found = modjax.from_pretrained(folder)
    modjax.save_pretrained(tmp_path / "out", found.spec, found.weights, config=found.config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    tokens_BL = tokens(CASES[name])
    with torch.no_grad():
        given = torch.tensor(tokens_BL, dtype=torch.long)
        first, *_ = theirs(given, output_hidden_states=True).hidden_states
    x_BLD = nnx.merge(found.graphdef, found.weights).embed(tokens_BL, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(x_BLD, np.float32), first.float().numpy())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mesh_of_8_devices_gives_the_same_logits(name, made):
    folder, model = made(name)
    case = CASES[name]
    tokens_BL = np.tile(tokens(case), (4, 1))
    mesh = make_mesh(Execution(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        found = modjax.from_pretrained(folder, dtype="float32", mesh=mesh)
        run = jax.jit(lambda weights: nnx.merge(found.graphdef, weights)(tokens_BL)[0])
        logits_BLV = np.asarray(run(found.weights))
    parts = [len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found.weights)]
    assert set(parts) == {8}
    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found.weights)]
    assert sum(split) > 5
    expected_BLV = np.tile(hf_models.logits(model, tokens(case)), (4, 1, 1))
    np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.sparse])
def test_the_numpy_decoder_equals_transformers(name, made):
    case = CASES[name]
    folder, model = made(name)
    config, found = json.loads((folder / "config.json").read_text()), tensors(folder)
    assert {n: t.shape for n, t in found.items()} == {
        case.prefix + n: shape for n, shape in shapes(case.config()).items()
    }
    logits_BLV = decode(config, found, tokens(case))
    expected_BLV = hf_models.logits(model, tokens(case))
    np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=1e-5)
