"""Bad files of pretrained models are refused in one line, which names the fault."""

import json
import struct

import numpy as np
import pytest

import modjax
from modjax.errors import InputError
from tests.pretrained.models.cases import CASES
from tests.pretrained.models.small_models import Case, shard, write, write_index

pytest.importorskip("safetensors", reason="the extra `pretrained`")


@pytest.fixture
def folder(tmp_path):
    """A folder with a small llama."""
    write(tmp_path, Case("llama"))
    return tmp_path


def refusal(path) -> str:
    """Returns the line that refuses a path."""
    with pytest.raises(InputError) as caught:
        modjax.from_pretrained(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 2000
    return line


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_good_files_are_read(folder):
    whole = modjax.from_pretrained(folder)
    shard(folder)
    assert modjax.from_pretrained(folder).spec == whole.spec


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file(folder, length):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:length])
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("size", [2**62, 2**63 + 5, 200_000_000])
def test_a_huge_header(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    assert "model.safetensors" in refusal(folder)


def test_a_header_that_is_no_json(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"\xff" * 12
    path.write_bytes(data)
    assert "model.safetensors" in refusal(folder)


def test_an_index_that_names_a_missing_file(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)


def test_an_index_that_names_a_missing_tensor(folder):
    index = shard(folder)
    write_index(folder, index | {"model.layers.9.mlp.up_proj.weight": next(iter(index.values()))})
    assert "model.layers.9.mlp.up_proj.weight" in refusal(folder)


def test_an_index_that_names_another_file_or_leaves_a_tensor_out(folder):
    index = shard(folder)
    name = "model.norm.weight"
    other = next(file for file in index.values() if file != index[name])
    write_index(folder, index | {name: other})
    assert name in refusal(folder)
    write_index(folder, {n: file for n, file in index.items() if n != name})
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none(folder, index):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert str(folder) in refusal(folder)


def test_an_index_that_leaves_the_folder(folder):
    index = shard(folder)
    inside, outside = folder / "inside", "../model-00001-of-00002.safetensors"
    inside.mkdir()
    for path in folder.glob("model-00002*"):
        path.rename(inside / path.name)
    (folder / "config.json").rename(inside / "config.json")
    write_index(inside, {n: outside if "00001" in f else f for n, f in index.items()})
    assert outside in refusal(inside)


def test_a_tensor_in_two_files(folder):
    from safetensors.numpy import load_file, save_file

    index = shard(folder)
    first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    name = next(name for name, file in index.items() if file == first.name)
    twice = {name: load_file(first)[name]}
    save_file(load_file(second) | twice, second, {"format": "pt"})
    assert name in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder, value):
    name = "model.layers.2.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 4] = value

    change_tensors(folder, spoil)
    assert name in refusal(folder)


def test_all_tensors_that_do_not_fit_are_listed_together(folder):
    def spoil(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.1.self_attn.k_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.ones(33, np.float32)

    change_tensors(folder, spoil)
    line = refusal(folder)
    assert "model.layers.1.self_attn.k_proj.weight" in line
    assert "model.layers.1.self_attn.k_proj.bias" in line
    assert "model.norm.weight" in line and "33" in line


def test_a_layer_more_than_the_config_says(folder):
    change_config(folder, num_hidden_layers=3)
    assert "model.layers.3." in refusal(folder)


def test_frequencies_in_the_file_are_ignored(folder):
    """Old files have them; they follow from the config."""

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    change_tensors(folder, add)
    modjax.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[1, 2]", "3", '"llama"', "{}", '{"model_type": 3}', "\0", "[" * 100_000],
)
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    line = refusal(folder)
    assert "config.json" in line or "model_type" in line


def test_a_config_that_is_not_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json" in refusal(folder)


def rope(rope_type, **values):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4} | values}


OLD_ROPE = {"rope_parameters": None, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "mamba"}, ("model_type", "mamba", "llama", "qwen3_moe")),
        ({"model_type": "LLaMA"}, ("model_type", "LLaMA")),
        ({"hidden_act": "relu"}, ("hidden_act", "relu")),
        ({"hidden_size": "32"}, ("hidden_size", "32")),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"hidden_size": -32}, ("-32",)),
        ({"num_hidden_layers": 0}, ("0",)),
        ({"num_attention_heads": 0}, ("0",)),
        ({"num_key_value_heads": 3}, ("3",)),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps", "small")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
        ({"logit_scale": 0.0625}, ("logit_scale", "0.0625")),
        ({"residual_multiplier": 0.22}, ("residual_multiplier",)),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        (rope("mrope"), ("rope_type", "mrope")),
        (rope("dynamic", factor=2.0), ("rope_type", "dynamic")),
        (rope("linear"), ("factor",)),
        (rope("default", rope_theta=0.0), ("0.0",)),
        (rope("default", mrope_section=[2, 3, 3]), ("mrope_section",)),
        ({"rope_parameters": [1]}, ("rope_parameters",)),
        (OLD_ROPE | {"rope_scaling": {"type": "su"}}, ("su",)),
        (OLD_ROPE | {"rope_scaling": "yes"}, ("rope_scaling",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_field_that_changes_numbers_is_refused(folder, changes, named):
    change_config(folder, **changes)
    line = refusal(folder)
    assert all(word in line for word in named), line


def test_fields_that_change_no_number_are_read_past(folder):
    change_config(
        folder,
        initializer_range=0.5,
        use_cache=False,
        transformers_version="9.0.0",
        attention_dropout=0.1,
        pretraining_tp=2,
        architectures=["LlamaForCausalLM"],
        _name_or_path="somewhere",
        unsloth_version="2024.9",
        quantization_config=None,
    )
    modjax.from_pretrained(folder)


@pytest.mark.parametrize(
    "case, changes, named",
    [
        (CASES["mixtral"], {"num_experts_per_tok": 7}, ("7",)),
        (CASES["qwen3_moe"], {"norm_topk_prob": "yes"}, ("norm_topk_prob", "yes")),
        (CASES["gemma2"], {"layer_types": ["full_attention"]}, ("layer_types",)),
        (CASES["gemma2"], {"layer_types": ["chunked_attention"] * 4}, ("layer_types", "chunked")),
        (CASES["gemma2"], {"attn_logit_softcapping": -1.0}, ("-1.0",)),
        (CASES["qwen2"], {"use_sliding_window": True, "sliding_window": 0}, ("0",)),
        (CASES["smollm3"], {"no_rope_layers": [1]}, ("no_rope_layers",)),
    ],
    ids=lambda value: value.family if isinstance(value, Case) else None,
)
def test_a_field_of_a_family_that_does_not_fit(tmp_path, case, changes, named):
    write(tmp_path, case)
    change_config(tmp_path, **changes)
    line = refusal(tmp_path)
    assert all(word in line for word in named), line


@pytest.mark.parametrize("where", ["nope", "", "a\0b", "x" * 5000])
def test_a_path_that_is_no_model(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repr(where)[:100] in refusal(where)


def test_a_folder_without_a_config_or_without_tensors(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert str(empty) in refusal(empty)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    assert "notes.txt" in refusal(path)


@pytest.mark.parametrize("version", [1, 4, 2**31, 3 << 24])
def test_a_gguf_file_of_an_unknown_version(tmp_path, version):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0) + bytes(100))
    assert "model.gguf" in refusal(path)
    assert "version" in refusal(path)


def test_a_dtype_that_there_is_not(folder):
    with pytest.raises(InputError, match="dtype"):
        modjax.from_pretrained(folder, dtype="float8")
