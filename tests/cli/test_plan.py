"""`sft plan`: the tables a person reads. What they are made from is the trainer's, and tested there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_cli.plan import show
from tests.cli.commands import MANIFEST, manifest, sft

PLAN: dict[str, Any] = {
    "resolved": {},
    "phases": [
        {
            "name": "instruct",
            "samples": 12_345,
            "tokens": 6_400_000,
            "lossTokens": 2_100_000,
            "dropped": {"NoLossTokens": 12, "Overlong": 3},
            "truncated": 4,
            "epochs": 10,
            "steps": 330,
            "microBatches": 8,
            "utilisation": 0.987,
            "bound": 0.993,
        }
    ],
    "totalSteps": 330,
    "memory": {"stage": {"1": 30e9, "2": 20e9, "3": 10e9}, "available": 80e9, "fits": True, "chosen": 1},
}


def test_the_tables_say_what_the_plan_holds(capsys: pytest.CaptureFixture[str]) -> None:
    show(PLAN, "lab", 8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lab: 330 optimizer steps on 8 GPUs"
    [row] = [line.split() for line in lines if line.strip().startswith("instruct")]
    assert row == ["instruct", "12,345", "6.4M", "2.1M", "4", "10", "330", "8", "98.7%", "99.3%", "12", "NoLossTokens"]
    assert [line.split() for line in lines if "chosen" in line] == [["1", "30.0", "GB", "◀", "chosen"]]
    assert lines[-1] == "Fits into 80.0 GB with ZeRO 1."


def test_a_job_that_does_not_fit_is_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show(PLAN | {"memory": PLAN["memory"] | {"fits": False, "chosen": 3, "available": 8e9}}, "lab", 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Does not fit into 8.0 GB with ZeRO 3: lower spec.batch.maxTokensPerGPU")


CHATTER = """
import os
from sft_cli.plan import stdout_for_us
with stdout_for_us():
    os.write(1, b"below\\n")
    print("above")
print("ours")
"""


def test_what_libraries_print_while_planning_does_not_reach_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", CHATTER], capture_output=True, text=True, check=True)
    assert done.stdout == "ours\n"
    assert sorted(done.stderr.split()) == ["above", "below"]


def test_a_manifest_with_problems_ends_in_ten(tmp_path: Path) -> None:
    manifest(tmp_path, MANIFEST.replace("recipe: TULU", "recipe: TULIP"))
    done = sft("plan", "job.yaml", "--gpus", "8", "-o", "json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr.startswith("job.yaml: spec.recipe: ")
