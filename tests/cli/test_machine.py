"""How many ranks, and where."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sft_api.run import ExitCode, RunError
from sft_api.spec import Trainer
from sft_cli.machine import choose, visible_gpus

LISTING = """\
GPU 0: NVIDIA H200 (UUID: GPU-1)
  MIG 1g.18gb     Device  0: (UUID: MIG-1)
GPU 1: NVIDIA H200 (UUID: GPU-2)
"""


def machine_with(folder: Path, listing: str, code: int = 0) -> dict[str, str]:
    """An environment whose nvidia-smi answers so."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}END\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("devices", "gpus"), [(None, 2), ("0", 1), ("0,1", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("0,1,2,3", 2)]
)
def test_gpus_are_counted_as_a_child_process_would_see_them(devices: str | None, gpus: int, tmp_path: Path) -> None:
    environment = machine_with(tmp_path, LISTING)
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    assert visible_gpus(environment, tmp_path / "nothing") == gpus


def test_the_drivers_folder_counts_where_nvidia_smi_is_missing_or_fails(tmp_path: Path) -> None:
    driver = tmp_path / "gpus"
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (driver / name).mkdir(parents=True)
    assert visible_gpus({"PATH": str(tmp_path)}, driver) == 3
    assert visible_gpus(machine_with(tmp_path, "", code=9), driver) == 3
    assert visible_gpus({"PATH": str(tmp_path)}, tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    ("trainer", "processes", "gpus", "ranks", "on_gpus", "note"),
    [
        (Trainer(gpus_per_node=0), None, 8, 1, 0, None),
        (Trainer(gpus_per_node=0), 3, 0, 3, 0, None),
        (Trainer(), None, 0, 1, 0, "The manifest asks for 1 GPU; no GPU can be seen here"),
        (Trainer(nodes=2, gpus_per_node=8), 2, 0, 2, 0, "2 nodes with 8 GPUs each; no GPU can be seen here"),
        (Trainer(), None, 4, 4, 4, None),
        (Trainer(gpus_per_node=2), None, 4, 2, 2, None),
        (Trainer(gpus_per_node=2), 1, 4, 1, 1, "The manifest asks for 2 GPUs; here it trains on 1 GPU"),
        (Trainer(nodes=2, gpus_per_node=8), None, 4, 4, 4, "2 nodes with 8 GPUs each; here it trains on 4 GPUs"),
        (Trainer(gpus_per_node=4), 4, 4, 4, 4, None),
    ],
)
def test_the_machine_that_is_there_is_used_and_a_difference_is_said(
    trainer: Trainer, processes: int | None, gpus: int, ranks: int, on_gpus: int, note: str | None
) -> None:
    chosen = choose(trainer, processes, gpus)
    assert (chosen.processes, chosen.gpus) == (ranks, on_gpus)
    assert (chosen.note is None) == (note is None)
    assert note is None or note in (chosen.note or "")


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(RunError, match="--processes 3 needs as many GPUs and 2 can be seen here") as caught:
        choose(Trainer(), 3, 2)
    assert caught.value.code is ExitCode.CONFIGURATION
