"""A small HTTP server that answers as an API server does: SFTJobs, pods and their logs, selectors, pages, refusals.

The tests of `sft status` and `sft logs` ask it through the real client, with a real kubeconfig.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TOKEN = "the-token"
PATHS = re.compile(
    r"^(?:/apis/sftjob\.dev/v1alpha1|/api/v1)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<kind>sftjobs|pods)"
    r"(?:/(?P<name>[^/]+)(?P<log>/log)?)?$"
)

Refusal = tuple[int, dict[str, Any] | str]
END = None
"""In a log that is followed: its last line is through."""


class ApiServer(ThreadingHTTPServer):
    """What it holds may be changed at any time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, list[dict[str, Any]]] = {"sftjobs": [], "pods": []}
        self.logs: dict[str, list[str] | SimpleQueue[str | None]] = {}
        """By pod: its lines, or what will be said while it is followed. A pod without has not started."""
        self.refusals: dict[str, Refusal] = {}
        """By kind: what is answered instead."""
        self.page = 500
        self.asked: list[tuple[str, dict[str, str]]] = []

    def kubeconfig(self, folder: Path, namespace: str | None = "lab", token: str = TOKEN) -> str:
        """Its path. The current context is `here`; another, `elsewhere`, has the namespace `other`."""
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        of_context = {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [
                {"name": "here", "context": of_context},
                {"name": "elsewhere", "context": of_context | {"namespace": "other"}},
            ],
            "current-context": "here",
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(config))
        return str(path)

    def answer(self, path: str, query: dict[str, str], token: str) -> tuple[int, Any]:
        """Status and body; a list of lines or a queue is a log."""
        self.asked.append((path, query))
        if token != f"Bearer {TOKEN}":
            return 401, failure("Unauthorized")
        found = PATHS.match(path)
        if found is None:
            return 404, "404 page not found"
        if refused := self.refusals.get(found["kind"]):
            return refused
        mine = [item for item in self.objects[found["kind"]] if in_namespace(item, found["namespace"])]
        if found["name"] is None:
            return 200, self.page_of([item for item in mine if is_selected(item, query)], query)
        named = [item for item in mine if item["metadata"]["name"] == found["name"]]
        if not named:
            return 404, failure(f'{found["kind"]} "{found["name"]}" not found')
        return self.log_of(found["name"], query) if found["log"] else (200, named[0])

    def page_of(self, items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        start = int(query.get("continue", "0"))
        size = min(self.page, int(query.get("limit", self.page)))
        more = {"continue": str(start + size)} if start + size < len(items) else {}
        return {"metadata": more, "items": items[start : start + size]}

    def log_of(self, pod: str, query: dict[str, str]) -> tuple[int, Any]:
        lines = self.logs.get(pod)
        if lines is None:
            return 400, failure(f'container "pytorch" in pod "{pod}" is waiting to start: ContainerCreating')
        if isinstance(lines, list) and "tailLines" in query:
            lines = lines[len(lines) - min(len(lines), int(query["tailLines"])) :]
        return 200, lines


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        status, body = self.server.answer(url.path, dict(parse_qsl(url.query)), self.headers.get("Authorization", ""))
        self.send_response(status)
        if isinstance(body, SimpleQueue | list):
            self.send_log(iter(body.get, END) if isinstance(body, SimpleQueue) else iter(body))
            return
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_log(self, lines: Iterator[str]) -> None:
        """In chunks, as an API server sends a log; each is on its way before the next is there."""
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = f"{line}\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        return


def failure(message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "message": message}


def in_namespace(item: dict[str, Any], namespace: str | None) -> bool:
    return namespace is None or item["metadata"]["namespace"] == namespace


def is_selected(item: dict[str, Any], query: dict[str, str]) -> bool:
    wanted = dict(term.split("=") for term in query.get("labelSelector", "").split(",") if term)
    return wanted.items() <= item["metadata"].get("labels", {}).items()


@contextmanager
def api_server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="api-server")
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
