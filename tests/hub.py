"""As much of the Hugging Face hub's HTTP API as a download needs, on this machine: a repository per folder.

Large files answer as on the hub: a redirect to another path, their SHA-256 in the listing, byte ranges. ``cut_after``
breaks a connection, ``refuse`` answers with an error, ``pause`` is seconds per 64 KiB.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

LARGE = 100_000  # bytes; what is larger is stored by SHA-256, as with Git LFS
BLOCK = 2**16


@dataclass
class Hub:
    """``repositories``: name to (commit, folder). Use as a context manager; ``url`` is the endpoint."""

    repositories: dict[str, tuple[str, Path]]
    cut_after: int | None = None  # bytes of a large file, for one connection
    refuse: tuple[int, str] | None = None  # status, X-Error-Code
    pause: float = 0.0
    damage: bool = False
    served: int = 0  # bytes of file content
    requests: list[tuple[str, str]] = field(default_factory=list)  # path, Range

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def listing(commit: str, repo: str, folder: Path) -> dict[str, Any]:
    siblings = []
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        content = file.read_bytes()
        entry = {"rfilename": file.relative_to(folder).as_posix(), "size": len(content),
                 "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        if len(content) > LARGE:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
        siblings.append(entry)
    return {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False, "tags": [],
            "downloads": 0, "likes": 0}


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.state, urlsplit(self.path).path
        hub.requests.append((path, self.headers.get("Range", "")))
        if hub.refuse:
            return self._send(hub.refuse[0], b"", {"X-Error-Code": hub.refuse[1]} if hub.refuse[1] else {})
        for repo, (commit, folder) in hub.repositories.items():
            if path.startswith(f"/api/models/{repo}/revision/"):
                if path.rsplit("/", 1)[1] not in (commit, "main"):
                    return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return self._send(200, json.dumps(listing(commit, repo, folder)).encode())
            for kind in ("/cdn", ""):
                start = f"{kind}/{repo}/resolve/{commit}/"
                if path.startswith(start) and (folder / path[len(start):]).is_file():
                    return self._file(folder / path[len(start):], direct=kind == "/cdn")
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, file: Path, direct: bool) -> None:
        content = file.read_bytes()
        if len(content) > LARGE and not direct:
            return self._send(302, b"", {"Location": f"{self.state.url}/cdn{self.path}"})
        wanted = self.headers.get("Range", "")
        begin = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if self.state.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self._stream(content[begin:], large=direct)

    def _stream(self, content: bytes, large: bool) -> None:
        hub = self.state
        for start in range(0, len(content), BLOCK):
            block = content[start:start + BLOCK]
            if large and hub.cut_after is not None and start + len(block) > hub.cut_after:
                hub.cut_after = None
                self.close_connection = True
                return
            try:
                self.wfile.write(block)
            except OSError:  # the other side has stopped
                return
            hub.served += len(block)
            time.sleep(hub.pause)
