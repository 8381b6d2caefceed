"""The cluster that all tests in this folder share: it is up from the first that asks for it to the end of the session.

    def test_something(cluster: Cluster) -> None: ...

Where this machine cannot have one these tests skip, saying why, and under CI they fail.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bed import Cluster
from tests.cluster.bring_up import Bed
from tests.cluster.lab import lab, undisturbed_digest
from tests.cluster.machine import traces, what_is_missing
from tests.cluster.operator import operator

__all__ = ["cluster", "lab", "operator", "undisturbed_digest"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Kubernetes of two nodes with the training operator and an S3 server."""
    if missing := what_is_missing():
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    bed = Bed.up(Path(tempfile.mkdtemp(prefix="sftjob-cluster-")), ends_with=os.getpid())
    try:
        yield Cluster(bed)
    finally:
        bed.down()
    assert traces(bed.layout) == [], "the cluster left something behind"
