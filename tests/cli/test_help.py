"""`sft` answers at once: nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import SFT, manifest, sft

HEAVY = {"torch", "transformers", "numpy", "pyarrow", "obstore", "deepspeed"}

LOADED = """
import json, sys
from sft_cli.__main__ import app
try:
    app(sys.argv[1:])
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.argv[1], "--help"], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["validate", "job.yaml"], ["run", "missing.yaml"]]
)
def test_what_needs_no_training_library_loads_none(arguments: list[str], tmp_path: Path) -> None:
    manifest(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_help_costs_less_than_a_second_of_computing() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED, str(SFT)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


def test_help_names_every_verb(tmp_path: Path) -> None:
    text = sft("--help", cwd=tmp_path).stdout
    assert all(f"\n  {verb} " in text for verb in ("run", "plan", "validate", "checkpoints", "report"))
