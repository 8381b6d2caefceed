"""A short chaos run, as anybody would start it: real ranks, a real S3 server, faults at random instants."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.chaos.__main__ import is_as_promised
from tests.s3 import versitygw

ROOT = Path(__file__).parents[2]
FAULTS = 6


def test_a_run_that_is_interrupted_at_random_ends_with_the_parameters_of_one_left_alone() -> None:
    versitygw()  # else there is nothing to be tried
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--faults", str(FAULTS), "--seed", "14", "-o", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert is_as_promised(found)
    assert found["faults"] == FAULTS
    assert found["attempts"] > 1
