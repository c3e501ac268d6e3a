"""The server of the live page: this machine only, under a secret address, read-only.

It is Python's own `http.server`: four fixed GET routes for one browser need no framework, and a run that is watched should
not import one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data: blob:"
)
HOST = "127.0.0.1"
DIGITS = 15
"""Of a version that a page may name."""
_HERE, _REPORT = files("fl_sim.cli") / "live", files("fl_sim") / "report"
HTML, SCRIPT, STYLE = "text/html; charset=utf-8", "text/javascript; charset=utf-8", "text/css; charset=utf-8"


class LiveServer(ThreadingHTTPServer):
    """Serves `state` and the page that shows it.

    Args:
        state: makes the JSON of the page: what is new since the version that the page has, with the version that it is.
        port: 0 = a free one.
        parent: a process that started this one; the server ends once it is gone.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, state: Callable[[int], Mapping[str, object]], port: int = 0, parent: int | None = None) -> None:
        self.state, self.token, self.parent = state, secrets.token_urlsafe(24), parent
        super().__init__((HOST, port), _Handler)

    def service_actions(self) -> None:
        """Look twice a second whether the parent is still there: a killed run must not leave a server behind."""
        if self.parent is not None and os.getppid() != self.parent:
            raise SystemExit

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    @cached_property
    def assets(self) -> dict[str, tuple[str, bytes, str]]:
        """Name -> (type, bytes, encoding)."""
        library = (_REPORT / "plotly" / "plotly-cartesian.min.js.gz").read_bytes()
        return {
            "": (HTML, (_HERE / "page.html").read_bytes(), ""),
            "page.js": (SCRIPT, (_HERE / "page.js").read_bytes(), ""),
            "page.css": (STYLE, (_REPORT / "page.css").read_bytes() + (_HERE / "page.css").read_bytes(), ""),
            "plotly.js": (SCRIPT, library, "gzip"),
        }


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Answer one request; whoever does not know the token, or comes by another name, learns nothing."""
        names = {f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}"}
        _, token, *rest = (self.path if "/" in self.path else "/").split("/")
        known = secrets.compare_digest(token.encode(), self.server.token.encode())
        if self.headers.get("Host") not in names or not known or len(rest) != 1:
            self._send(404, "text/plain", b"not found\n")
        elif rest[0].partition("?")[0] == "state.json":
            self._state(rest[0].partition("?since=")[2])
        elif rest[0] in self.server.assets:
            kind, data, encoding = self.server.assets[rest[0]]
            self._send(200, kind, data, encoding)
        else:
            self._send(404, "text/plain", b"not found\n")

    def _state(self, since: str) -> None:
        """Send what is new since a version; nothing where nothing is."""
        version = int(since) if since.isascii() and since.isdecimal() and len(since) <= DIGITS else 0
        state = self.server.state(version)
        if version and state["version"] == version:
            self._send(204, "application/json", b"")
        else:
            self._send(200, "application/json", json.dumps(state, separators=(",", ":")).encode())

    def _send(self, status: int, kind: str, data: bytes, encoding: str = "") -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items() | ({"Content-Encoding": encoding}.items() if encoding else set()):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are no news."""
