"""What this machine computes with, found without loading a training library."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_api.run import ExitCode, RunError
from sft_api.spec import Compute


@dataclass(frozen=True)
class Machine:
    """How the job runs here: `processes` ranks, on as many GPUs or (gpus = 0) on the CPU."""

    processes: int
    gpus: int
    note: str | None
    """What differs from the manifest, in one line."""


def visible_gpus(environment: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """Number of GPUs that a process started with this environment would see."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    present = present_gpus(environment, driver)
    if chosen is None:
        return present
    listed = 0
    for device in chosen.split(","):
        if not device.strip() or device.strip() == "-1":  # CUDA stops at the first that is none
            break
        listed += 1
    return min(listed, present)


def present_gpus(environment: Mapping[str, str], driver: Path) -> int:
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program:
        listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
        if listing.returncode == 0:
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def choose(trainer: Compute, processes: int | None, gpus: int) -> Machine:
    """How many ranks, and where. Raises RunError where `--processes` asks for more GPUs than there are.

    A number of GPUs that the manifest does not name is all of this machine's.
    """
    wanted = trainer.nodes * trainer.gpus_per_node
    if wanted == 0 or gpus == 0:
        ranks = processes or 1
        return Machine(ranks, 0, cpu_note(trainer, ranks) if wanted else None)
    if processes is not None and processes > gpus:
        raise RunError(
            ExitCode.CONFIGURATION,
            f"--processes {processes} needs as many GPUs and {gpus} can be seen here; give at most {gpus},"
            " or --set spec.trainer.gpusPerNode=0 for the CPU",
        )
    named = "gpus_per_node" in trainer.model_fields_set or trainer.nodes > 1
    used = processes or (min(wanted, gpus) if named else gpus)
    note = None
    if used != wanted and named:
        note = (
            f"The manifest asks for {asked(trainer)}; here it trains on {counted(used, 'GPU')}, with the same batches."
        )
    return Machine(used, used, note)


def cpu_note(trainer: Compute, ranks: int) -> str:
    return (
        f"The manifest asks for {asked(trainer)}; no GPU can be seen here, so it trains on the CPU"
        f" with {counted(ranks, 'process', 'processes')} and the same batches."
    )


def asked(trainer: Compute) -> str:
    nodes = f"{trainer.nodes} nodes with " if trainer.nodes > 1 else ""
    return f"{nodes}{counted(trainer.gpus_per_node, 'GPU')}{' each' if nodes else ''}"


def counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
