"""Where a job's results are: from a URI, or from a manifest that names it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft_api.recipes import resolve
from sft_api.run import RunConfig
from sft_cli.laptop import refuse_claim
from sft_cli.manifests import read_job

URI = re.compile(r"^[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True)
class Place:
    """A job's store, with what the manifest says of the job where one was given."""

    uri: str
    name: str
    config: RunConfig | None = None


def find(source: str) -> Place:
    """`source` is a URI or the path of a manifest. Raises BadManifest and RunError."""
    if URI.match(source):
        return Place(source, source.rstrip("/").rpartition("/")[2])
    config = resolve(read_job(source))
    refuse_claim("spec.checkpoints.uri", config.checkpoints.uri)
    return Place(config.checkpoints.uri, config.name, config)
