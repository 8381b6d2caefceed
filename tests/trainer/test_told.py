"""run.json while a job runs: the kubelet puts another file in its place when the manifest changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_api.manifest import parse_job
from sft_api.recipes import resolve
from sft_api.run import ExitCode, RunError
from sft_trainer.told import AsTold, read_config
from tests.trainer.runs import SPEC


def write(folder: Path, keep: dict[str, Any], lifecycle: dict[str, Any] | None = None) -> Path:
    """As a kubelet does: a folder of its own, to which a link is moved."""
    spec = SPEC | {
        "model": {"uri": "file:///m", "chatTemplate": {"name": "ChatML"}},
        "phases": [{"name": "one", "data": [{"uri": "file:///d.jsonl"}]}],
        "checkpoints": {"uri": "file:///out", "keep": keep},
        "lifecycle": lifecycle or {},
    }
    manifest = {"apiVersion": "sftjob.dev/v1alpha1", "kind": "SFTJob", "metadata": {"name": "test"}, "spec": spec}
    return replace(folder, resolve(parse_job(manifest)).model_dump_json(by_alias=True))


def replace(folder: Path, text: str) -> Path:
    version = folder / f"version-{len(list(folder.iterdir()))}"
    version.mkdir()
    (version / "run.json").write_text(text)
    link = folder / "..data_tmp"
    link.symlink_to(version)
    link.rename(folder / "..data")
    return folder / "..data" / "run.json"


def test_what_may_change_while_the_job_runs_is_as_it_is_now(tmp_path: Path) -> None:
    told = AsTold(write(tmp_path, {"last": 2}))
    assert (told().checkpoints.keep.last, told().checkpoints.keep.best, told().loss_guard) == (2, 0, None)
    write(tmp_path, {"last": 5, "phaseEnds": False}, {"lossGuard": 9.5})
    assert (told().checkpoints.keep.last, told().checkpoints.keep.phase_ends, told().loss_guard) == (5, False, 9.5)


def test_what_was_told_last_counts_where_run_json_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"last": 2})
    told = AsTold(path)
    replace(tmp_path, "{")
    assert told().checkpoints.keep.last == 2
    path.unlink()
    assert told().checkpoints.keep.last == 2
    write(tmp_path, {"last": 3})
    assert told().checkpoints.keep.last == 3


def test_a_run_json_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json is not a resolved job") as caught:
        read_config(replace(tmp_path, "{}"))
    assert caught.value.code == ExitCode.CONFIGURATION
