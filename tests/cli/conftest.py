"""Fixtures of the tests of `sft`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.api_server import ApiServer, api_server


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as running:
        yield running
