"""SFTJobs for the test cluster: a small model on two pods, its data in a bucket, and what became of it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sft_trainer.store import Store
from tests.trainer.runs import SPEC

SFT = Path(sys.executable).with_name("sft")
SECRET = "bucket"
"""Name of the Secret with the bucket's credentials."""


def document(name: str, bucket: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """An SFTJob of two phases on two pods; `changes` replace whole sections of the spec, or parts of mappings."""
    spec: dict[str, Any] = copy.deepcopy(SPEC)
    spec["model"] = {"uri": f"{bucket}/base/model", "chatTemplate": {"name": "ChatML"}}
    spec["phases"] = [{"name": phase, "data": [{"uri": f"{bucket}/base/{phase}.jsonl"}]} for phase in ("one", "two")]
    spec["trainer"] |= {"nodes": 2}
    spec["checkpoints"] |= {
        "uri": f"{bucket}/runs/{name}",
        "credentials": {"secretRef": {"name": SECRET}},
        "keep": {"last": 2},
        "export": "End",
    }
    for section, value in (changes or {}).items():
        spec[section] = spec.get(section, {}) | value if isinstance(value, dict) else value
    return {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": {"name": name}, "spec": spec}


LONG = {
    "epochs": 100,
    "checkpoints": {"every": {"steps": 10}},
    "validation": {"fraction": 0.15, "every": {"steps": 100}},
}
"""Some hundred steps: time enough to interrupt it."""


def upload(folder: Path, uri: str) -> None:
    """Put every file of a folder under `uri`."""
    store = Store.open(uri, path="the test's")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(str(path.relative_to(folder)), path)


def secret(environment: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "stringData": environment}


def sft(*arguments: str, environment: dict[str, str], cwd: Path, seconds: float = 400) -> str:
    """What `sft` prints, run on this machine."""
    done = subprocess.run(
        [str(SFT), *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def last_checkpoint(uri: str, environment: dict[str, str], cwd: Path) -> dict[str, Any]:
    """The row of `sft checkpoints` of the newest checkpoint; every byte of it was read."""
    rows = json.loads(sft("checkpoints", uri, "-o", "json", environment=environment, cwd=cwd))
    newest: dict[str, Any] = rows[-1]
    assert newest["complete"], newest
    assert newest["verified"], newest
    return newest
