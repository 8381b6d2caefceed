"""Reads an image's archive, as `docker save` writes it, without a container engine."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Image:
    """An image: its names, its configuration, and its files as the layers leave them."""

    names: list[str]
    config: dict[str, Any]
    files: dict[str, tarfile.TarInfo]

    @property
    def size(self) -> int:
        """Bytes of all files, uncompressed."""
        return sum(file.size for file in self.files.values())

    def named(self, *names: str) -> list[str]:
        """Paths of files, or links, whose last part is one of `names`."""
        return [path for path, file in self.files.items() if Path(path).name in names and not file.isdir()]


def read_image(archive: Path) -> Image:
    with tarfile.open(archive) as tar:
        [manifest] = json.loads(content(tar, "manifest.json"))
        config = json.loads(content(tar, manifest["Config"]))["config"]
        files: dict[str, tarfile.TarInfo] = {}
        for layer in manifest["Layers"]:
            with tar.extractfile(layer) as packed, tarfile.open(fileobj=packed) as unpacked:  # type: ignore[union-attr]
                lay_over(files, unpacked)
    return Image(manifest["RepoTags"], config, files)


def lay_over(files: dict[str, tarfile.TarInfo], layer: tarfile.TarFile) -> None:
    """A layer's files over those below it; `.wh.name` says that `name` is gone."""
    for member in layer:
        path = Path(member.name)
        if path.name.startswith(".wh."):
            files.pop(str(path.with_name(path.name.removeprefix(".wh."))), None)
        else:
            files[str(path)] = member


def content(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()
