"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty prefix, in a folder and in a bucket of a real S3 server. It ends in `/x`."""
    if request.param == "file":
        return f"file://{tmp_path}/x"
    bucket: str = request.getfixturevalue("s3_bucket")
    return f"{bucket}/x"
