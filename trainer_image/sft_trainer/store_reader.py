"""An object as a file: reads and seeks become range reads."""

from __future__ import annotations

import io
from collections.abc import Callable

from typing_extensions import Buffer


class RangeReader(io.RawIOBase):
    """A read-only, seekable file over `get_range(start, stop)`. A read is a request: wrap it in a BufferedReader."""

    def __init__(self, get_range: Callable[[int, int], bytes], size: int):
        """`size` in bytes of the whole object."""
        self._get_range = get_range
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer)
        data = self._read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(max(0, self._size - self._position))

    def _read(self, count: int) -> bytes:
        stop = min(self._position + count, self._size)
        if stop <= self._position:
            return b""
        data = self._get_range(self._position, stop)
        self._position += len(data)
        return data
