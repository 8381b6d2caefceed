"""Uploads that leave room on the network: so many bytes a second, for as long as nobody waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 1 << 20
SMALLEST_PART_BYTES, MOST_PARTS = 8 << 20, 10_000
"""What S3 allows of a multipart upload: parts of at least 5 MiB, and so many of them."""


class Pace:
    """A limit to one upload at a time, which may be lifted from another thread."""

    def __init__(self, bytes_per_second: float):
        self._bytes_per_second = bytes_per_second
        self._lifted = threading.Event()

    def lift(self) -> None:
        """From now on as fast as it goes."""
        self._lifted.set()

    def part_bytes(self, size: int, most: int) -> int:
        """Of the parts of an upload of `size` bytes: a second's worth, for each leaves all at once; at most `most`."""
        smallest = max(SMALLEST_PART_BYTES, -(-size // MOST_PARTS))
        return max(smallest, min(int(self._bytes_per_second), most))

    def read(self, path: Path) -> Iterator[bytes]:
        """The file in blocks, each when its last byte is due."""
        started, sent = time.monotonic(), 0
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                sent += len(block)
                self._lifted.wait(max(0.0, started + sent / self._bytes_per_second - time.monotonic()))
                yield block
