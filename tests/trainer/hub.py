"""As much of the Hugging Face Hub as `snapshot_download` asks for, over HTTP on the loopback, from a folder of models.

with Hub({"owner/name": folder}) as hub:
    ...  # HF_ENDPOINT=hub.endpoint
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves each folder as a model with one branch, `main`. `gated` names need a token."""

    def __init__(self, models: Mapping[str, Path], gated: frozenset[str] = frozenset()):
        self.models, self.gated = models, gated
        self.downloaded: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?(?:/)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (listing or file).groups()[:2] if listing or file else ("", None)  # type: ignore[union-attr]
        if name in self.gated:
            return self._send(request, 403, {"X-Error-Code": "GatedRepo"}, b"{}", with_body)
        if name not in self.models:
            return self._send(request, 404, {"X-Error-Code": "RepoNotFound"}, b"{}", with_body)
        if revision not in (None, "main", self.commit(name)):
            return self._send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"{}", with_body)
        if listing:
            return self._send(request, 200, {}, self._listing(name, is_tree="/tree/" in path), with_body)
        assert file is not None
        return self._send_file(request, name, file[3], with_body)

    def _listing(self, name: str, is_tree: bool) -> bytes:
        root = self.models[name]
        files = sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())
        if is_tree:
            return json.dumps(
                [{"type": "file", "path": f, "size": (root / f).stat().st_size, "oid": "0" * 40} for f in files]
            ).encode()
        siblings = [{"rfilename": f} for f in files]
        return json.dumps({"id": name, "modelId": name, "sha": self.commit(name), "siblings": siblings}).encode()

    def _send_file(self, request: BaseHTTPRequestHandler, name: str, path: str, with_body: bool) -> None:
        file = self.models[name] / path
        if not file.is_file():
            return self._send(request, 404, {"X-Error-Code": "EntryNotFound"}, b"", with_body)
        if with_body:
            self.downloaded.append(path)
        data = file.read_bytes()
        headers = {"X-Repo-Commit": self.commit(name), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        return self._send(request, 200, headers, data, with_body)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes, with_body: bool
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)
