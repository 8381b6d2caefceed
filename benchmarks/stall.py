"""How long a save holds up training, beside a save that training waits for from beginning to end.

    python -m benchmarks.stall [-o json] [--rounds N] [--device cuda]

One rank's state (fp32 masters and both moments) is saved to a real S3 server on this machine, which has no network to
cross, and again at 100 MB/s, as a network would have it. Of each save both numbers are taken: the seconds for which
training stands still, which are those of staging, and the seconds until the checkpoint is committed (staged, uploaded,
read back, marked complete), for which it would stand still if nothing happened in the background.
`tests/tools/build_tools.sh` builds the server.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.reporting import Comparison, Figure, Report, arguments
from sft_api import names
from sft_api.spec import Keep
from sft_trainer.checkpoint import CheckpointMeta, CheckpointWriter
from sft_trainer.checkpoint.shards import Piece
from sft_trainer.store import Store
from tests.s3 import S3Server

SIZES_MB = (50, 400)
NETWORK_BYTES_PER_SECOND = 100e6
TARGET = 0.05
KEYS = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class Slice:
    """A parameter that this rank owns alone."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, torch.Tensor]
    step: int = 1


def make_pieces(megabytes: int, device: str) -> list[Piece]:
    """State of so many bytes, in parameters of 4,000,000 elements at most, as a model's are of several sizes."""
    left = megabytes * 1_000_000 // (4 * len(KEYS))
    pieces: list[Piece] = []
    while left:
        count = min(left, 4_000_000)
        tensors = {key: torch.randn(count, device=device) for key in KEYS}
        pieces.append(Slice(f"layer.{len(pieces)}", (count,), 0, tensors))
        left -= count
    return pieces


@dataclass(frozen=True)
class Saved:
    """Of one save, seconds."""

    stall: float
    whole: float


def save_again_and_again(
    store: Store, staging: Path, pieces: list[Piece], saves: int, bytes_per_second: float | None
) -> Iterator[Saved]:
    """Save after save of one attempt; training would go on between the two clocks."""
    committed = threading.Event()
    store.create(names.attempt(1), b"")
    writer = CheckpointWriter(
        store, attempt=1, rank=0, world=1, staging=staging, keep=lambda: Keep(last=1),
        on_commit=lambda event: committed.set(), bytes_per_second=bytes_per_second,
    )  # fmt: skip
    for step in range(1, saves + 1):
        committed.clear()
        started = time.perf_counter()
        stall = writer.save(pieces, {}, make_meta(step))
        while not committed.wait(1.0) and writer.failure is None:
            pass
        whole = time.perf_counter() - started
        writer.wait()
        yield Saved(stall, whole)
    writer.close()


def make_meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(
        step=step, phase="one", epoch=1, cursor={}, samples=step, world_size=1, zero_stage=1, fingerprints={}, time=0.0
    )


def compare(
    bucket: str, staging: Path, megabytes: int, rounds: int, device: str, bytes_per_second: float | None
) -> tuple[list[Comparison], str]:
    """The lines of one size, and what its first save took, which finds cold memory."""
    across = f"{bytes_per_second / 1e6:.0f} MB/s" if bytes_per_second else "no network"
    what = f"{megabytes:,} MB on {device}, {across}"
    store = Store.open(f"{bucket}/{megabytes}-{across.replace('/', ' ')}")
    first, *saved = save_again_and_again(store, staging, make_pieces(megabytes, device), rounds + 1, bytes_per_second)
    stall, whole = Figure.of([s.stall for s in saved], "s"), Figure.of([s.whole for s in saved], "s")
    share = Figure.of(s.stall / s.whole for s in saved)
    note = f"{what}: the first save of the process held training up for {first.stall:.3f} s of {first.whole:.3f} s"
    return [
        Comparison(f"stall, {what}", stall, whole, "synchronous"),
        Comparison(f"share of a synchronous save, {what}", share, target=TARGET),
    ], note


@contextmanager
def server(folder: Path) -> Iterator[S3Server]:
    (folder / "buckets").mkdir()
    server = S3Server(folder / "buckets")
    server.start()
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        server.kill()


def main() -> int:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the state lives (cpu)")
    options = parser.parse_args()
    comparisons, notes = [], []
    with tempfile.TemporaryDirectory(prefix="stall-") as name, server(Path(name)) as s3:
        bucket = s3.new_bucket()
        for megabytes in SIZES_MB:
            for bytes_per_second in (None, NETWORK_BYTES_PER_SECOND):
                found, note = compare(
                    bucket, Path(name) / "staging", megabytes, options.rounds, options.device, bytes_per_second
                )
                comparisons += found
                notes.append(note)
    Report("stall", comparisons, notes, versions={"torch": torch.__version__}).print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
