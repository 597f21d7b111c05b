"""The Hub's answers about one repository, on loopback: what it holds, and its files, in ranges too."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "org/Model"
COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub(ThreadingHTTPServer):
    """Serves the files of a directory. Files in `cut` break off after so many bytes, and then do not come at all."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.cut: dict[str, int] = {}
        self.sent: list[tuple[str, int]] = []
        """Each file that was asked for, and from which byte on."""
        self.spoilt: set[str] = set()
        """Files whose content is not what the Hub's hash is of."""
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sibling(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
        found: dict[str, Any] = {"rfilename": path.name, "size": len(content), "blobId": git}
        if path.suffix == ".safetensors":
            digest = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return found


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        hub = self.server
        path = self.path.partition("?")[0]
        if path == f"/api/models/{REPO}" and hub.status == 200:
            siblings = [hub.sibling(file) for file in sorted(hub.folder.iterdir())]
            about = {"id": REPO, "sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}}
            self._answer(200, json.dumps(about).encode())
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self._send(path.rpartition("/")[2])
        else:
            status = hub.status if hub.status != 200 else 404
            code = {401: {"X-Error-Code": "GatedRepo"}, 404: {"X-Error-Code": "RepoNotFound"}}.get(status)
            self._answer(status, b"{}", code)

    def _send(self, name: str) -> None:
        hub = self.server
        content = (hub.folder / name).read_bytes()
        if name in hub.spoilt:
            content = bytes(len(content))
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        hub.sent.append((name, begin))
        end = hub.cut.get(name, len(content))
        if name in hub.cut and begin:
            self.close_connection = True
            return
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(content[begin:end])

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(folder: Path) -> Iterator[FakeHub]:
    """A Hub with the files of `folder` as REPO."""
    hub = FakeHub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
