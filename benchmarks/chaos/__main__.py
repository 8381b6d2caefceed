"""A seeded run over two phases, interrupted at random instants by random faults, beside the same run left alone.

    python -m benchmarks.chaos --faults 100 --seed 1 -o json

Real ranks, a real S3 server over HTTP, a gateway that fails as networks and permissions do. The last line of output is
one JSON object; -o json has every fault and its instant before it. Samples lost are those of steps that are missing in
the history of the final weights; samples repeated are those in it beyond what the schedule says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.gateway import Gateway
from benchmarks.chaos.run import World, as_json, disturb, processes_of, wait_until_quiet
from sft_api.events import StepMetrics
from sft_api.manifest import parse_job
from sft_api.recipes import resolve
from sft_trainer.checkpoint import list_checkpoints
from sft_trainer.report import merge, read_attempts
from sft_trainer.store import Store
from tests.s3 import S3Server
from tests.trainer.runs import SPEC, make_base

STEPS_PER_FAULT = 24
"""More than a fault can take: the run must not be complete before the last has struck."""
STAGING_BYTES = 64 * 1024 * 1024
FULL_DISK = "a full disk under the staging area"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, default=1, help="of which faults, and when (1)")
    parser.add_argument("--processes", type=int, default=2, help="ranks (2)")
    parser.add_argument("--only", action="append", metavar="NAME", choices=sorted(FAULTS), help="of these faults alone")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="what to print")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaving nothing behind
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        found = chaos(Path(folder), options.faults, options.seed, options.processes, options.only)
    if options.output == "json":
        print(json.dumps(found["log"], indent=1))
    else:
        print_table(found)
    print(json.dumps({key: value for key, value in found.items() if key != "log"}))
    return 0 if is_as_promised(found) else 1


def chaos(folder: Path, faults: int, seed: int, processes: int, only: list[str] | None = None) -> dict[str, Any]:
    """One disturbed run beside one left alone; what differs between them."""
    base = make_base(folder)
    buckets = folder / "buckets"
    (buckets / "chaos").mkdir(parents=True)
    server = S3Server(buckets)
    server.start()
    gateway = Gateway(server.endpoint)
    gateway.start()
    os.environ.update(server.environment)
    try:
        with small_disk(folder / "staging") as is_small:
            names = only or [name for name in FAULTS if is_small or name != FULL_DISK]
            worlds = {}
            for name in ("alone", "disturbed"):
                run_json = write_run(folder, base, f"s3://chaos/{name}", name, faults)
                place = buckets / "chaos" / name
                worlds[name] = World(server, gateway, run_json, place, folder / "staging", processes)
                call(worlds[name], "prepare")
            call(worlds["alone"], "train", "--processes", str(processes))
            log = disturb(worlds["disturbed"], faults, random.Random(seed), names, folder / "trainer.log")
            wait_until_quiet(folder)
        if log.faults < faults:
            print(json.dumps(as_json(log), indent=1), file=sys.stderr)
            sys.exit(f"the run was complete after {log.faults} of {faults} faults: it is too short for them")
        return compared(seed, processes, log, sorted(set(FAULTS) - set(names)))
    finally:
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)
        gateway.stop()
        server.kill()


def write_run(folder: Path, base: Path, uri: str, name: str, faults: int) -> Path:
    """run.json of the two-phase job, long enough for so many faults."""
    spec: dict[str, Any] = json.loads(json.dumps(SPEC))
    spec["model"] = {"uri": f"file://{base}/model", "chatTemplate": {"name": "ChatML"}}
    spec["phases"] = [{"name": phase, "data": [{"uri": f"file://{base}/{phase}.jsonl"}]} for phase in ("one", "two")]
    spec["epochs"] = max(4, -(-STEPS_PER_FAULT * faults // 5))
    spec["validation"]["every"] = {"steps": 50}
    spec["checkpoints"] = {"uri": uri, "every": {"steps": 3}, "keep": {"last": 4}, "export": "End"}
    spec["lifecycle"] = {"hangTimeoutSeconds": 30}
    document = {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": {"name": "chaos"}, "spec": spec}
    path = folder / f"{name}.json"
    path.write_text(resolve(parse_job(document)).model_dump_json(by_alias=True))
    return path


def call(world: World, command: str, *more: str) -> None:
    """A command of the trainer that nothing disturbs."""
    done = subprocess.run(
        [sys.executable, "-m", "sft_trainer", command, str(world.run_json), *more],
        env=world.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder`, where this user may mount one; else a plain folder."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={STAGING_BYTES}", "tmpfs", str(folder)]
    is_small = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield is_small
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def compared(seed: int, processes: int, log: Any, left_out: list[str]) -> dict[str, Any]:
    """What the disturbed run did otherwise than the one left alone."""
    alone, disturbed = (
        Store.open("s3://chaos/alone", path="alone"),
        Store.open("s3://chaos/disturbed", path="disturbed"),
    )
    due, done = surviving_steps(alone), surviving_steps(disturbed)
    sizes = {step: metrics.samples - (due[step - 1].samples if step > 1 else 0) for step, metrics in due.items()}
    lost = [
        step for step, metrics in due.items() if step not in done or done[step].samples_digest != metrics.samples_digest
    ]
    beyond = [
        step for step, metrics in done.items() if step not in due or due[step].samples_digest != metrics.samples_digest
    ]
    rows = list_checkpoints(disturbed, verify=True)
    last = rows[-1]
    return {
        "faults": log.faults,
        "samplesLost": sum(sizes[step] for step in lost),
        "samplesRepeated": sum(
            done[step].samples - (done[step - 1].samples if step - 1 in done else 0) for step in beyond
        ),
        "sameParameters": last.parameters_digest == list_checkpoints(alone, verify=True)[-1].parameters_digest,
        "sameLosses": [due[step].loss for step in sorted(due)] == [done[step].loss for step in sorted(done)],
        "steps": len(due),
        "stepsTakenAgain": merge(read_attempts(disturbed, ignore), []).steps_lost,
        "attempts": log.attempts,
        "damagedCheckpointsAtTheEnd": sum(row.complete and not row.verified for row in rows),
        "wrongEnds": log.wrong_ends,
        "seed": seed,
        "ranks": processes,
        "leftOut": left_out,
        "log": as_json(log),
    }


def surviving_steps(store: Store) -> dict[int, StepMetrics]:
    """The steps that the final weights went through, by number."""
    return {metrics.step: metrics for metrics in merge(read_attempts(store, ignore), []).steps}


def ignore(warning: str) -> None:
    """Lines that were cut off with their writer are expected."""


def is_as_promised(found: dict[str, Any]) -> bool:
    nothing = found["samplesLost"] == found["samplesRepeated"] == 0 and not found["wrongEnds"]
    return bool(nothing and found["sameParameters"] and found["sameLosses"])


def print_table(found: dict[str, Any]) -> None:
    for name, count in found["log"]["struck"].items():
        print(f"{count:5d}  {name}")
    print(f"exit codes: {found['log']['exitCodes']}")


if __name__ == "__main__":
    sys.exit(main())
