"""The header of a GGUF file, the format of llama.cpp: its keys, and where its tensors lie.

It replaces the reader of the package gguf, which makes several objects for every token: 160 MB for
50,000 of them. That reader also loops as often as a damaged header says.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from modjax.errors import describe, require
from modjax.files import damaged, open_file, reason

_NUMBERS = dict(zip([*range(8), 10, 11, 12], "BbHhIif?Qqd", strict=True))  # codes of `struct`
_TEXT, _LIST = 8, 9
_DAMAGE = (EOFError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)


class TensorInfo(NamedTuple):
    """A tensor in a GGUF file.

    kind: number of its GGML type.
    shape: outermost dim first; the file lists the innermost first.
    offset: its first byte in the file.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int


class _Cursor:
    """A position in the bytes of a header."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at = content, 8

    def take(self, size: int) -> bytes:
        part = self.content[self.at : self.at + size]
        if len(part) != size:
            raise EOFError(f"it ends at byte {len(self.content)}, within its header")
        self.at += size
        return part

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def text(self) -> str:
        return self.take(*self.numbers("Q", 1)).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.numbers(_NUMBERS[kind], 1)[0]
        (inner,), (count,) = self.numbers("I", 1), self.numbers("Q", 1)
        if inner in _NUMBERS:
            return list(self.numbers(_NUMBERS[inner], count))
        return [self.value(inner) for _ in range(count)]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Returns the keys and the tensors of a GGUF file. Raises InputError for any other file."""
    try:
        with open_file(path) as file:
            start = file.read(8)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise damaged(path, "must be a GGUF file", reason(error)) from error
    with content:
        require(start[:4] == b"GGUF", str(path), start[:4], "must begin with b'GGUF'")
        version = int.from_bytes(start[4:], "little")
        require(version in (2, 3), f"{path}: version", version, "must be 2 or 3, and little-endian")
        try:
            return _read(_Cursor(content))
        except _DAMAGE as error:
            raise damaged(path, "must be a whole GGUF file", describe(error)) from error


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    tensor_count, key_count = cursor.numbers("Q", 2)
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        keys[key] = cursor.value(*cursor.numbers("I", 1))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        shape = cursor.numbers("Q", *cursor.numbers("I", 1))
        (kind,), (offset,) = cursor.numbers("I", 1), cursor.numbers("Q", 1)
        if name in tensors:
            raise ValueError(f"it has the tensor {name} twice")
        tensors[name] = TensorInfo(kind, shape[::-1], offset)
    alignment = keys.get("general.alignment", 32)
    data = -(-cursor.at // alignment) * alignment  # offsets count from here
    return keys, {n: info._replace(offset=data + info.offset) for n, info in tensors.items()}
