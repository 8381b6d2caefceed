"""The digest of parameters: the same however they are cut, another when anything about them changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_trainer.checkpoint.digest import ParametersDigest, digest_slice

VALUES = np.random.default_rng(0).standard_normal(40_000, np.float32)
SHAPE = (200, 200)
WHOLE = digest_slice("w", SHAPE, 0, VALUES)


@given(st.lists(st.integers(0, len(VALUES)), max_size=6))
def test_slices_add_up_to_the_whole_wherever_they_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(VALUES)]
    parts = [digest_slice("w", SHAPE, a, VALUES[a:b]) for a, b in itertools.pairwise(edges)]
    assert sum(reversed(parts), ParametersDigest()) == WHOLE


@given(st.integers(0, len(VALUES) - 1), st.integers(0, 31))
def test_one_bit_of_one_element_changes_it(index: int, bit: int) -> None:
    changed = VALUES.copy()
    changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
    other = digest_slice("w", SHAPE, 0, changed)
    assert other.low != WHOLE.low
    assert other.high != WHOLE.high


@given(st.integers(0, len(VALUES) - 2))
def test_exchanged_neighbours_change_it(index: int) -> None:
    changed = VALUES.copy()
    changed[[index, index + 1]] = changed[[index + 1, index]]
    assert digest_slice("w", SHAPE, 0, changed) != WHOLE


@pytest.mark.parametrize(
    "other",
    [
        digest_slice("v", SHAPE, 0, VALUES),
        digest_slice("w", (100, 400), 0, VALUES),
        digest_slice("w", SHAPE, 1, VALUES),
        digest_slice("w", SHAPE, 1 << 32, VALUES),
    ],
    ids=["name", "shape", "position", "position beyond 32 bits"],
)
def test_the_same_values_elsewhere_are_other_parameters(other: ParametersDigest) -> None:
    assert other != WHOLE


def test_a_slice_across_the_32_bit_border_adds_up() -> None:
    border = 1 << 32
    whole = digest_slice("w", (1 << 33,), border - 1000, VALUES)
    parts = [(border - 1000, VALUES[:999]), (border - 1, VALUES[999:1002]), (border + 2, VALUES[1002:])]
    assert sum((digest_slice("w", (1 << 33,), start, part) for start, part in parts), ParametersDigest()) == whole


def test_it_is_written_as_32_digits_and_read_back() -> None:
    assert len(str(WHOLE)) == 32
    assert ParametersDigest.parse(str(WHOLE)) == WHOLE
    assert str(ParametersDigest()) == "0" * 32


def test_it_does_not_change_from_release_to_release() -> None:
    """Digests of finished runs are compared with those of later ones."""
    assert str(digest_slice("w", (3,), 0, np.array([1, -2, 0.5], np.float32))) == "8202bf09a7c521835169746a0c7cf51a"
