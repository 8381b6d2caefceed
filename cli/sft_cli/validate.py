"""`sft validate`: every problem of every file, one a line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sft_cli.manifests import read_jobs


def validate(files: Sequence[str]) -> int:
    """0 where every file holds valid SFTJobs; otherwise 1, with the problems on stdout."""
    valid = True
    for file in files:
        reading = read_jobs(file)
        for finding in reading.findings:
            print(finding)
        for name in reading.passed_over:
            print(f"{file}: {name} is no SFTJob and was passed over", file=sys.stderr)
        valid = valid and not reading.findings
    return 0 if valid else 1
