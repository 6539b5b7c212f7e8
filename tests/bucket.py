"""A fake of Google's object store. It serves gs:// URLs to processes with its environment."""

import http.server
import itertools
import json
import random
import threading
import time
from urllib.parse import parse_qs, unquote, urlsplit


class Bucket:
    """One bucket, gs://bucket.

    objects: name -> content.
    refuse: names that it refuses to store.
    left: number of requests that it answers before it refuses all; None for no limit.
    seconds: time that it takes to store an object.
    failing: the share of requests that it refuses at random.
    requests: method and name of each request that stores or deletes, in order.
    sent: name of each object whose content was asked for and sent, in order.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.count, self.failing, self.rng = itertools.count(2), 0.0, random.Random(0)
        self.refuse: set[str] = set()
        self.left: int | None = None
        self.lock = threading.Lock()
        self.seconds = 0.0
        self.requests: list[tuple[str, str]] = []
        self.sent: list[str] = []
        handler = type("Handler", (_Handler,), {"bucket": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.environment = {
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{self.server.server_port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        }

    def generation(self, name: str) -> int:
        """Returns the number of an object's content, or 0 if there is no object."""
        return self.generations.setdefault(name, 1) if name in self.objects else 0

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # connections that come at once must not wait to be tried again


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: Bucket

    def do_POST(self):
        """Stores an object."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        query = parse_qs(urlsplit(self.path).query)
        (name,) = query["name"]
        self.bucket.requests.append(("POST", name))
        time.sleep(self.bucket.seconds)
        if not self._is_here():
            return self._answer(404, b"no such bucket")
        if name in self.bucket.refuse or self._too_late():
            return self._answer(403, b"no permission")
        with self.bucket.lock:
            found = self.bucket.generation(name)
            if query.get("ifGenerationMatch", [str(found)]) != [str(found)]:
                return self._answer(412)
            self.bucket.objects[name] = body
            generation = self.bucket.generations[name] = next(self.bucket.count)
        self._answer(200, json.dumps({"name": name, "generation": str(generation)}).encode())

    def do_GET(self):
        """Lists the names in a range, or returns an object or a range of its bytes."""
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        if not self._is_here():
            return self._answer(404, b"no such bucket")
        if self._too_late():
            return self._answer(403, b"no permission")
        if "alt" not in query:
            first, end = query.get("startOffset", [""])[0], query.get("endOffset", ["\xff"])[0]
            names = [name for name in sorted(self.bucket.objects) if first <= name < end]
            return self._answer(200, json.dumps({"items": [{"name": n} for n in names]}).encode())
        name = unquote(parts.path.rpartition("/o/")[2])
        if name not in self.bucket.objects:
            return self._answer(404)
        content, generation = self.bucket.objects[name], str(self.bucket.generation(name))
        if query.get("ifGenerationNotMatch") == [generation]:
            return self._answer(304, generation=generation)
        self.bucket.sent.append(name)
        wanted = self.headers.get("Range")
        if not wanted:
            return self._answer(200, content, generation=generation)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(content) - int(last)
        stop = int(last) + 1 if first and last else len(content)
        self._answer(
            206, content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}", generation
        )

    def do_DELETE(self):
        name = unquote(urlsplit(self.path).path.rpartition("/o/")[2])
        self.bucket.requests.append(("DELETE", name))
        if self._too_late():
            return self._answer(403, b"no permission")
        self._answer(404 if self.bucket.objects.pop(name, None) is None else 204)

    def _is_here(self) -> bool:
        return "/b/bucket/" in self.path

    def _too_late(self) -> bool:
        with self.bucket.lock:
            if self.bucket.rng.random() < self.bucket.failing:
                return True
            if self.bucket.left:
                self.bucket.left -= 1
                return False
            return self.bucket.left == 0

    def _answer(
        self, status: int, content: bytes = b"", content_range: str = "", generation: str = "1"
    ):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", generation)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *arguments):
        pass
