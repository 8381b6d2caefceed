"""A digest of parameters by name, shape and value that does not depend on who holds which slice.

Every element is mixed, together with its place, into a 64-bit number, and the numbers are added modulo 2^64: sums of
slices add up to the sum of the whole, in any order. Two such lanes make 128 bits. The mixer is the finaliser of
splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014). It finds damage and
disagreement; it is no defence against somebody who constructs collisions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_CHUNK = 1 << 14  # elements: three buffers of 8 bytes each stay in the second-level cache
_BLOCK = 1 << 32  # element indices beyond 32 bits go into the seed, block by block

_FIRST, _SECOND, _THIRD = (np.uint64(c) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93))
_30, _27, _31, _29, _32 = (np.uint64(shift) for shift in (30, 27, 31, 29, 32))


@dataclass(frozen=True)
class ParametersDigest:
    """Two sums modulo 2^64. `+` joins disjoint slices; `str` is 32 hexadecimal digits."""

    low: int = 0
    high: int = 0

    def __add__(self, other: ParametersDigest) -> ParametersDigest:
        return ParametersDigest((self.low + other.low) & _MASK, (self.high + other.high) & _MASK)

    def __str__(self) -> str:
        return f"{self.high:016x}{self.low:016x}"

    @classmethod
    def parse(cls, digits: str) -> ParametersDigest:
        return cls(low=int(digits[16:], 16), high=int(digits[:16], 16))


def digest_slice(name: str, shape: Sequence[int], start: int, values: NDArray[np.float32]) -> ParametersDigest:
    """The share of the elements [start, start + len(values)) of the flattened fp32 parameter `name` of `shape`."""
    assert values.dtype == np.float32, values.dtype
    assert values.ndim == 1, values.ndim
    bits = values.view(np.uint32)
    counting = np.arange(_CHUNK, dtype=np.uint64)
    mixed, shifted = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64)
    low = high = position = 0
    while position < len(bits):
        index = start + position
        count = min(_CHUNK, len(bits) - position, _BLOCK - index % _BLOCK)
        z, t = mixed[:count], shifted[:count]
        np.add(counting[:count], np.uint64(index), out=z)
        np.left_shift(z, _32, out=z)
        np.bitwise_or(z, bits[position : position + count], out=z)
        np.bitwise_xor(z, _seed(name, tuple(shape), index // _BLOCK), out=z)
        _mix(z, t)
        low += int(np.add.reduce(z))
        np.multiply(z, _THIRD, out=z)
        _fold(z, t, _29)
        high += int(np.add.reduce(z))
        position += count
    return ParametersDigest(low & _MASK, high & _MASK)


def _mix(z: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> None:
    _fold(z, scratch, _30)
    np.multiply(z, _FIRST, out=z)
    _fold(z, scratch, _27)
    np.multiply(z, _SECOND, out=z)
    _fold(z, scratch, _31)


def _fold(z: NDArray[np.uint64], scratch: NDArray[np.uint64], shift: np.uint64) -> None:
    np.right_shift(z, shift, out=scratch)
    np.bitwise_xor(z, scratch, out=z)


def _seed(name: str, shape: tuple[int, ...], block: int) -> np.uint64:
    text = f"{name}\0{shape}\0{block}".encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
