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
        (where, doc_id, _, label, *_), last = document[0], len(document) - 1
        counted = [request.idx for request in document] == [*range(last + 1)]
        accepted = f'"idx" must count the lines of doc_id {doc_id} from 0 to {last}'
        require(counted, "--tasks", where, accepted)
        accepted = f'"label" is {label!r}: must be 0 to {last}, or a text in every document'
        fits = label in range(last + 1) if choice else not isinstance(label, int) and last == 0
        require(fits, "--tasks", where, accepted)
    return documents
