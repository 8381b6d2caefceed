"""`make cluster` and `make cluster-down`: a cluster for a person, in .cluster of the checkout.

python -m tests.cluster up
python -m tests.cluster load build/images/operator.tar
python -m tests.cluster down
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.cluster.bring_up import GUARD, Bed
from tests.cluster.images import ROOT
from tests.cluster.machine import what_is_missing

UP = """\
A Kubernetes {version} of two nodes is up ({seconds:.0f} s). Use it with:

  export KUBECONFIG={state}/kubeconfig PATH={state}/bin:$PATH
  kubectl get nodes

Object storage for pods and for this machine: {endpoint}, {access_key} / {secret_key}; its buckets are the folders in
{state}/s3/buckets. docs/first-job.md has a job to try on it; make cluster-down takes it all down.
"""


def up(state: Path) -> None:
    if missing := what_is_missing():
        sys.exit(f"There can be no cluster on this machine: {missing}.")
    if bed := Bed.find(state):
        if bed.client.is_ready():
            sys.exit(f"The cluster in {state} is up already: make cluster-down takes it down.")
        bed.down()  # what was left when the machine was switched off
    began = time.monotonic()
    bed = Bed.up(state)
    version = bed.client.request("GET", "/version")["gitVersion"]
    s3 = {"endpoint": bed.s3.endpoint, "access_key": bed.s3.access_key, "secret_key": bed.s3.secret_key}
    print(UP.format(version=version, seconds=time.monotonic() - began, state=state, **s3), end="")


def down(state: Path) -> None:
    bed = Bed.find(state)
    if bed is None:
        shutil.rmtree(state, ignore_errors=True)
        sys.exit(f"There is no cluster in {state}.")
    bed.down()


def load(state: Path, archive: Path) -> None:
    """Put the images of a docker-archive into both nodes, under the names that they have there."""
    bed = Bed.find(state)
    if bed is None:
        sys.exit(f"There is no cluster in {state}: make cluster brings one up.")
    if not archive.exists():
        sys.exit(f"There is no {archive}: make images builds the operator's and the trainer's into build/images.")
    for node in bed.nodes.values():
        node.import_image(archive.resolve())


def guard(state: Path, pid: int) -> None:
    """Wait for another process to end, however it does, and take its cluster down if it has not."""
    with suppress(ProcessLookupError):  # it may have ended while we were starting
        select.select([os.pidfd_open(pid)], [], [])
    if bed := Bed.find(state):
        bed.down()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("up", "down", "load", GUARD):
        arguments = verbs.add_parser(name)
        arguments.add_argument("--state", type=Path, default=ROOT / ".cluster")
        if name == GUARD:
            arguments.add_argument("pid", type=int)
        if name == "load":
            arguments.add_argument("archive", type=Path)
    given = vars(parser.parse_args())
    verbs_by_name: dict[str, Callable[..., None]] = {"up": up, "down": down, "load": load, GUARD: guard}
    verbs_by_name[given.pop("verb")](**given)


main()
