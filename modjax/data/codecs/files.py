"""Tokenizers of pretrained models: opened from a folder, a file or a GGUF file, and written."""

import json
import os
from pathlib import Path
from typing import Any

from modjax.data.codecs.codec import Codec
from modjax.data.codecs.gguf_tokenizer import read_fields, rebuilt, settings_of
from modjax.data.codecs.tokenizer import MOST_CONTENT, Settings, Tokenizer, check_package
from modjax.errors import InputError, require
from modjax.files import MOST_JSON, read_file, reason

# Files beside a tokenizer.json that name special tokens, from the weakest to the strongest.
NAMES = ("special_tokens_map.json", "tokenizer_config.json")
ACCEPTED = "must be a folder with a tokenizer.json, a tokenizer.json itself, or a GGUF file"


def open_tokenizer(path: Path | str) -> Tokenizer:
    """Opens the tokenizer of a pretrained model.

    path: a folder with a tokenizer.json, that file itself, or a GGUF file. Files beside the
      tokenizer.json may name special tokens and hold the chat template.
    Raises InputError if there is none, or if it cannot be used.
    """
    found = find_tokenizer(path)
    if found is None:
        raise InputError("tokenizer", str(path), f"no tokenizer here: {ACCEPTED}")
    return found


def find_tokenizer(path: Path | str) -> Tokenizer | None:
    """Opens the tokenizer as `open_tokenizer` does, but returns None if there is none."""
    path = Path(path)
    check_package("tokenizers")
    if path.suffix == ".gguf":
        fields = read_fields(path)
        if "ggml.model" not in fields:
            return None
        return Tokenizer(rebuilt(fields, str(path)), str(path), settings_of(fields))
    file = path / "tokenizer.json" if os.path.isdir(path) else path
    content = _read(file, MOST_CONTENT)
    return None if content is None else Tokenizer(content, str(path), _settings(file.parent))


def write_tokenizer(folder: Path, codec: Codec) -> None:
    """Writes a vocabulary under Hugging Face's file names; writes nothing for bytes."""
    if not isinstance(codec, Tokenizer):
        if codec.content:
            (folder / "tokenizer.model").write_bytes(codec.content)
        return
    (folder / "tokenizer.json").write_bytes(codec.content)
    special, template = codec.settings.special, codec.settings.template
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    values |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def tokenizer_name(path: Path | str) -> str:
    """Returns the name of a folder, or the name of a file without its suffix."""
    path = Path(os.path.abspath(path))
    return path.name if os.path.isdir(path) else path.stem


def _read(path: Path, most: int) -> bytes | None:
    """Returns the content of a file of at most `most` bytes, or None if there is no file."""
    try:
        return read_file(path, most)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError("tokenizer", str(path), f"cannot be read: {reason(error)}") from error


def _values(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or {} if there is no file."""
    content = _read(path, MOST_JSON)
    try:
        values = json.loads(content) if content is not None else {}
        require(isinstance(values, dict), "tokenizer", str(path), "must be a JSON object")
        return values
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("tokenizer", str(path), f"is not JSON ({error})") from error


def _settings(folder: Path) -> Settings:
    """Returns the settings in the files beside a tokenizer.json."""
    special: dict[str, str] = {}
    config: dict[str, Any] = {}
    for name in NAMES:
        config = _values(folder / name)
        special |= {key: text for key in config if (text := _token(key, config)) is not None}
    generation, model = _values(folder / "generation_config.json"), _values(folder / "config.json")
    said = [values for values in (generation, model) if values.get("eos_token_id") is not None]
    return Settings(
        special=special,
        eos_ids=_ids("eos_token_id", said[0], folder) if said else (),
        bos_id=next(iter(_ids("bos_token_id", model, folder)), None),
        template=_template(folder, config),
    )


def _token(key: str, config: dict[str, Any]) -> str | None:
    """Returns the text of a special token such as "eos_token", or None for any other key."""
    value = config[key]
    text = value.get("content") if isinstance(value, dict) else value
    return text if key.endswith("_token") and isinstance(text, str) else None


def _ids(key: str, values: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """Returns the token ids under a key, which holds one id, a list of ids or nothing."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [value] if value is not None else []
    usable = all(isinstance(i, int) and i >= 0 for i in ids)
    require(usable, f"{key} of {folder}", value, "must be token ids")
    return tuple(ids)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """Returns the chat template in chat_template.jinja, or else in tokenizer_config.json."""
    file = _read(folder / "chat_template.jinja", MOST_JSON)
    if file is not None:
        return file.decode(errors="replace")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
