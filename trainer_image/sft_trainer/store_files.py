"""What obstore leaves out on file://: durability, lasting deletion, and sweeping up after writers that were killed.

Its local backend writes `name#1` and renames or links it into place, never with an fsync: after a power cut a marker
could stand without the data that it vouches for, and a killed writer's `name#1` stays for ever.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_ORPHAN = re.compile(r"#\d+$")


def make_durable(root: Path, keys: Iterable[str]) -> None:
    """fsync the files, and every folder from theirs up to the one that holds `root`: any may have just been made."""
    folders: set[Path] = set()
    for key in keys:
        _fsync(root / key)
        folders.update(_folders_above(root, key))
    folders.add(root.parent)
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        _fsync(folder)


def delete(paths: Iterable[Path]) -> None:
    """Delete files for good; those that are not there are no error."""
    folders = set()
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            folders.add(path.parent)
    for folder in folders:
        _fsync(folder)


def sweep(root: Path, prefix: str) -> None:
    """Remove orphans and empty folders under `prefix`, and the folders above it up to `root` that are empty then."""
    for folder, _, files in os.walk(root / prefix, topdown=False):
        for name in filter(_ORPHAN.search, files):
            Path(folder, name).unlink(missing_ok=True)
        _remove_if_empty(Path(folder))
    for above in _folders_above(root, prefix):
        if above != root:
            _remove_if_empty(above)


def _folders_above(root: Path, key: str) -> list[Path]:
    """From the folder of `key` up to `root`."""
    within = (root / key).parent
    return [folder for folder in (within, *within.parents) if folder.is_relative_to(root)]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or another process was quicker
        folder.rmdir()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
