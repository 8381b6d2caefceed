"""Which files a data source means: a URI or a glob becomes a sorted list of files, each with its size and digest."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import BinaryIO, Protocol

from sft_api.run import ExitCode, RunError
from sft_api.spec import DataFormat
from sft_trainer.prepare.hub import HubFolder, split_hub_uri
from sft_trainer.store import Store

_MAGIC = re.compile(r"[*?\[]")
_DIGEST_BLOCK = 1 << 20


class Kind(StrEnum):
    """How a file holds records; the value is the end of its name."""

    JSONL = ".jsonl"
    JSONL_GZIP = ".jsonl.gz"
    JSONL_ZSTD = ".jsonl.zst"
    PARQUET = ".parquet"


class Folder(Protocol):
    """A prefix that can be listed and read: a Store, or a repository on the Hugging Face Hub."""

    @property
    def uri(self) -> str:
        """Without a slash at its end."""

    def sizes(self) -> dict[str, int]:
        """Size in bytes by key, of everything below the prefix."""

    def size(self, key: str) -> int | None:
        """Size in bytes of one object; none where it is missing."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader."""


@dataclass(frozen=True)
class StoreFolder:
    """A Store as a folder of data files."""

    store: Store

    @property
    def uri(self) -> str:
        return self.store.uri

    def sizes(self) -> dict[str, int]:
        return {found.key: found.size for found in self.store.list()}

    def size(self, key: str) -> int | None:
        found = self.store.head(key) if key else None
        return found.size if found else None

    def open(self, key: str) -> BinaryIO:
        return self.store.open_reader(key)


@dataclass(frozen=True)
class DataFile:
    """One file of records."""

    folder: Folder
    key: str
    size: int
    kind: Kind
    format: DataFormat
    path: str
    """The field of the manifest that names its source."""

    @property
    def name(self) -> str:
        """As a person would write it: a plain path for local files, else a URI."""
        return f"{self.folder.uri}/{self.key}".removeprefix("file://")

    def open(self) -> BinaryIO:
        return self.folder.open(self.key)

    def digest(self) -> str:
        """SHA-256 of the content, hexadecimal. Reads the whole file, a block at a time."""
        digest = hashlib.sha256()
        with self.open() as reader:
            while block := reader.read(_DIGEST_BLOCK):
                digest.update(block)
        return digest.hexdigest()


def find_files(uri: str, format: DataFormat, path: str) -> list[DataFile]:
    """The files that `uri` names, sorted by key. An object whose name holds glob characters is found by its name.

    Raises RunError(DATA) where nothing is there or a name does not say how to read it.
    """
    folder, pattern = _open(uri, path)
    size = folder.size(pattern)
    if size is not None:
        sizes = {pattern: size}
    elif _MAGIC.search(pattern):
        matches = glob_pattern(pattern).fullmatch
        sizes = {key: size for key, size in folder.sizes().items() if matches(key)}
    else:
        sizes = {}
    if not sizes:
        what = "matches no file" if _MAGIC.search(pattern) else "is no file"
        raise RunError(ExitCode.DATA, f"{uri} {what}: give a file or a glob of files.", path)
    return [DataFile(folder, key, sizes[key], _kind(uri, key, path), format, path) for key in sorted(sizes)]


def read_object(uri: str, path: str) -> bytes:
    """A small object as a whole. On the Hub, `hf://owner/name/file` is a file of a model's repository."""
    folder, key = _open(uri, path, hub_default="model")
    if folder.size(key) is None:
        raise RunError(ExitCode.CONFIGURATION, f"{uri} is no file.", path)
    with folder.open(key) as reader:
        return reader.read()


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within a folder, `**/` crosses any number of them, none included; `[…]` and `[!…]` are sets."""
    parts: list[str] = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]|.", pattern, flags=re.DOTALL):
        if token == "**/":
            parts.append("(?:.*/)?")
        elif token == "**":
            parts.append(".*")
        elif token == "*":
            parts.append("[^/]*")
        elif token == "?":
            parts.append("[^/]")
        elif len(token) > 1:
            negated = token[1] in "!^"
            members = token[2:-1] if negated else token[1:-1]
            escaped = re.sub(r"([\\\[\]^])", r"\\\1", members)
            parts.append(f"(?!/)[{'^' if negated else ''}{escaped}]")
        else:
            parts.append(re.escape(token))
    return re.compile("".join(parts), flags=re.DOTALL)


def _open(uri: str, path: str, hub_default: str = "dataset") -> tuple[Folder, str]:
    """The folder above the first glob character, and the rest of the URI as a pattern relative to it."""
    if uri.startswith("hf://"):
        repository, pattern = split_hub_uri(uri, hub_default, path)
        return HubFolder.at(repository, path), pattern
    magic = _MAGIC.search(uri)
    fixed = uri[: magic.start()] if magic else uri
    above, slash, _ = fixed.rpartition("/")
    root = f"{above}/" if above.endswith(":/") else above
    if root.endswith("//"):  # file://name: relative to the working directory
        root, start = f"{root}.", len(root)
    else:
        start = len(above) + len(slash)
    return StoreFolder(Store.open(root, path=path)), uri[start:]


def _kind(uri: str, key: str, path: str) -> Kind:
    name = PurePosixPath(key).name
    for kind in (Kind.JSONL_GZIP, Kind.JSONL_ZSTD, Kind.JSONL, Kind.PARQUET):
        if name.endswith(kind.value):
            return kind
    allowed = ", ".join(kind.value for kind in Kind)
    message = f"{uri} names {name}, whose kind is not known by its name: allowed are {allowed}."
    raise RunError(ExitCode.DATA, message, path)
