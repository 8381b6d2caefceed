"""hf:// URIs, against a small server that answers as the Hub does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sft_api.run import ExitCode, RunError
from sft_api.spec import DataFormat
from sft_trainer.prepare.hub import Repository, split_hub_uri
from sft_trainer.prepare.records import read_chunks
from sft_trainer.prepare.sources import find_files, read_object
from tests.trainer.prepare.builders import chat

PATH = "spec.phases[0].data[0].uri"
COMMIT = "c" * 40


@dataclass
class Hub:
    """The files of one data set and one model, and what was asked for."""

    files: dict[str, bytes]
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    status: int = 200


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path, _, _ = self.path.partition("?")
            if hub.status != 200:
                return self.answer(hub.status, b"{}", {"X-Error-Code": "GatedRepo"} if hub.status == 403 else {})
            if not path.removeprefix("/api").startswith(("/datasets/lab/data", "/models/lab/model", "/lab/model")):
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if "/resolve/" in path:
                return self.file(path.partition(f"/resolve/{COMMIT}/")[2])
            if "/tree/" in path:
                return self.json(hub.files)
            if "/revision/" in path and not path.endswith(("/main", "/v1")):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.json(None)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.json({key: value for key, value in hub.files.items() if key in body.replace("%2F", "/")})

        def json(self, files: dict[str, bytes] | None) -> None:
            found: Any = {"id": "lab/data", "sha": COMMIT}
            if files is not None:
                found = [
                    {"type": "file", "path": path, "size": len(data), "oid": sha256(data).hexdigest()[:40]}
                    for path, data in files.items()
                ]
            self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def file(self, key: str) -> None:
            if key not in hub.files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            data = hub.files[key]
            return self.answer(200, data, {"ETag": f'"{sha256(data).hexdigest()[:40]}"', "X-Repo-Commit": COMMIT})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing on the terminal."""

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    lines = json.dumps(chat("a", "b")).encode() + b"\n"
    hub = Hub({"data/b.jsonl": lines * 2, "data/a.jsonl": lines, "README.md": b"# hi", "chat.jinja": b"{{ messages }}"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("uri", ["hf://datasets/lab/data/data/*.jsonl", "hf://lab/data@v1/**/*.jsonl"])
def test_a_data_set_on_the_hub_is_read_at_one_commit(hub: Hub, uri: str) -> None:
    files = find_files(uri, DataFormat.MESSAGES, PATH)
    assert [file.name for file in files] == [
        "hf://datasets/lab/data/data/a.jsonl",
        "hf://datasets/lab/data/data/b.jsonl",
    ]
    records = [
        record for file in files for chunk in read_chunks(file, 0, lambda count: None) for _, record in chunk.records()
    ]
    assert records == [chat("a", "b")] * 3
    assert hub.requests[0].endswith("/revision/v1" if "@v1" in uri else "/api/datasets/lab/data")
    resolved = [request for request in hub.requests if "/resolve/" in request]
    assert resolved
    assert all(f"/datasets/lab/data/resolve/{COMMIT}/data/" in request for request in resolved)


def test_one_file_is_found_without_listing_the_repository(hub: Hub) -> None:
    (file,) = find_files("hf://lab/data/data/b.jsonl", DataFormat.MESSAGES, PATH)
    assert file.size == len(hub.files["data/b.jsonl"])
    assert not any("/tree/" in request for request in hub.requests)


def test_a_chat_template_is_read_from_a_models_repository(hub: Hub) -> None:
    assert read_object("hf://lab/model/chat.jinja", "spec.model.chatTemplate.uri") == b"{{ messages }}"
    assert any(request == "GET /api/models/lab/model" for request in hub.requests)
    with pytest.raises(RunError, match=r"hf://lab/model/other\.jinja is no file"):
        read_object("hf://lab/model/other.jinja", "spec.model.chatTemplate.uri")


@pytest.mark.parametrize(
    ("uri", "message", "code"),
    [
        ("hf://lab/data/data/*.txt", "matches no file", ExitCode.DATA),
        ("hf://lab/data/c.jsonl", "is no file", ExitCode.DATA),
        ("hf://lab/nothing/*", "the dataset lab/nothing on the Hub does not exist, or is private", ExitCode.DATA),
        ("hf://lab/data@v9/*", "lab/data on the Hub has no revision 'v9'", ExitCode.DATA),
        ("hf://data.jsonl", "names no file on the Hub: write hf://datasets/owner/name/path", ExitCode.CONFIGURATION),
        ("hf://datasets/lab/data", "names no file on the Hub", ExitCode.CONFIGURATION),
    ],
)
def test_what_is_not_on_the_hub_is_said(hub: Hub, uri: str, message: str, code: ExitCode) -> None:
    with pytest.raises(RunError, match=message) as error:
        find_files(uri, DataFormat.MESSAGES, PATH)
    assert (error.value.code, error.value.path) == (code, PATH)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, ExitCode.STORE_REFUSED, "is gated: ask for access"),
        (401, ExitCode.STORE_REFUSED, "answered 401"),
        (500, ExitCode.STORE_UNAVAILABLE, "answered 500"),
    ],
)
def test_a_refusal_of_the_hub_is_told_from_an_outage(hub: Hub, status: int, code: ExitCode, message: str) -> None:
    hub.status = status
    with pytest.raises(RunError, match=message) as error:
        find_files("hf://lab/data/a.jsonl", DataFormat.MESSAGES, PATH)
    assert error.value.code == code


def test_a_hub_that_does_not_answer_is_an_outage(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(RunError, match="could not be r") as error:
        find_files("hf://lab/data/a.jsonl", DataFormat.MESSAGES, PATH)
    assert error.value.code == ExitCode.STORE_UNAVAILABLE


def test_the_kind_of_a_repository_may_be_written_out() -> None:
    models = split_hub_uri("hf://models/lab/model@main/a/b", "dataset", PATH)
    assert models == (Repository("model", "lab/model", "main"), "a/b")
