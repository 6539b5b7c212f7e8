"""Files of likelihood tasks: JSON lines, each with a context and a continuation."""

from pathlib import Path
from typing import Any, NamedTuple

from modjax.data.prepare.documents import json_lines
from modjax.errors import require

UNCONDITIONAL = 1_000_000  # from this doc_id on, lines serve to normalise others
FIELDS = {
    "doc_id": (int, "an integer"),
    "idx": (int, "an integer"),
    "label": (int | str | list, "the idx of the right continuation, or its text"),
    "request.context": (str, "a string"),
    "request.continuation": (str, "a string that is not empty"),
}


class Request(NamedTuple):
    """A continuation to score after its context. where: its file and line."""

    where: str
    doc_id: int
    idx: int
    label: Any
    context: str
    continuation: str


def read_task(path: Path, limit: int | None) -> list[list[Request]]:
    """Returns the requests of each document, by idx. limit: the number of documents, or None.

    Raises InputError for a file without documents, and for a missing or impossible field.
    """
    found: dict[int, list[Request]] = {}
    for number, line in json_lines(path, "--tasks"):
        where, values = f"{path}:{number}", []
        for name, (kind, accepted) in FIELDS.items():
            value = line
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            fits = isinstance(value, kind) and (value != "" or name == "request.context")
            require(fits, "--tasks", where, f'needs "{name}", {accepted}')
            values.append(value)
        if values[0] < UNCONDITIONAL:
            found.setdefault(values[0], []).append(Request(where, *values))
    documents = [sorted(each, key=lambda request: request.idx) for each in found.values()][:limit]
    require(len(documents) > 0, "--tasks", str(path), "holds no document")
    choice = isinstance(documents[0][0].label, int)
    for document in documents:
        (where, doc_id, _, label, *_), indices = document[0], [request.idx for request in document]
        counted = indices == [*range(len(indices))]
        fits = label in indices if choice else not isinstance(label, int) and len(indices) == 1
        accepted = f'doc_id {doc_id} has "idx" {indices}, which must count from 0, and "label" '
        accepted += f"{label!r}, which must be one of them, or a text in every document"
        require(counted and fits, "--tasks", where, accepted)
    return documents
