"""Standard output and error streams that may be closed, full or unread while work goes on."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Lasting:
    """A text stream that hides its errors from the writer.

    lost: the first error, or None. Everything written after it is dropped.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: OSError | None = None
        if hasattr(stream, "reconfigure"):  # characters outside the encoding are no error either
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError):  # without a descriptor, nothing is left to flush
                os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting() -> Iterator[Lasting]:
    """Replaces sys.stdout and sys.stderr by `Lasting` streams, and yields the first."""
    for descriptor in (0, 1, 2):  # else the next open file would take that of a closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    streams = (sys.stdout, sys.stderr)
    out, err = (Lasting(stream or open(os.devnull, "w", encoding="utf-8")) for stream in streams)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
        try:
            yield out
        finally:
            out.flush()
            err.flush()
