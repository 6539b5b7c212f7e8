"""Which token caches a folder or an object store holds."""

import os
import re
from pathlib import Path

from modjax.data.cache import (
    STORE_ERRORS,
    open_store,
    parse_manifest,
    read_manifest,
    shown,
    url,
)
from modjax.data.manifest import Manifest
from modjax.errors import MOST_SHOWN, InputError, one_line
from modjax.files import reason


def list_caches(data_dir: Path | str) -> list[Manifest | InputError]:
    """Returns the manifest of every cache in a folder, by name, or why it cannot be read.

    [] where there is none. Raises InputError where the folder itself cannot be read.
    """
    caches: list[Manifest | InputError] = []
    for name in _cache_names(data_dir):
        path = Path(data_dir) / name
        try:
            found = read_manifest(path)
            if found is not None:
                caches.append(parse_manifest(path, found))
        except InputError as error:
            caches.append(error)
    return caches


def _cache_names(data_dir: Path | str) -> list[str]:
    """Returns the names of the folders that may hold a cache."""
    try:
        if url(data_dir) is None:
            return sorted(name for name in os.listdir(data_dir) if not name.startswith("."))
        keys = open_store(data_dir).list().result()
    except FileNotFoundError:
        return []
    except STORE_ERRORS as error:
        why = one_line(reason(error), MOST_SHOWN)
        raise InputError("--data-dir", shown(data_dir), f"cannot be listed: {why}") from error
    found = (re.fullmatch(r"([^./][^/]*)/manifest\.json", key.decode()) for key in keys)
    return sorted(match[1] for match in found if match)
