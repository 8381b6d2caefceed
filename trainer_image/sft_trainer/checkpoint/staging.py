"""The part of a save that training waits for: this rank's state into a local file, so that the live one may change."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_api.run import ExitCode, RunError
from sft_trainer.checkpoint.shards import Piece, encode_header, write_shard

_FULL = (errno.ENOSPC, errno.EDQUOT)


def stage(path: Path, pieces: Sequence[Piece], rank_state: Mapping[str, bytes]) -> int:
    """Write the shard to `path`; bytes written. RunError where there is no room, and then there is no file either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = len(encode_header(pieces, rank_state)) + sum(4 * len(t) for p in pieces for t in p.tensors.values())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise _no_room(path, needed, free)
    try:
        return write_shard(path, pieces, rank_state)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in _FULL:
            raise _no_room(path, needed, shutil.disk_usage(path.parent).free) from error
        raise RunError(ExitCode.STORE_REFUSED, f"staging a checkpoint in {path.parent}: {error.strerror}") from error


def _no_room(path: Path, needed: int, free: int) -> RunError:
    return RunError(
        ExitCode.STORE_REFUSED,
        f"staging a checkpoint needs {needed / 1e6:,.1f} MB in {path.parent}, and {free / 1e6:,.1f} MB are free: "
        "free some space, or set TMPDIR to a larger disk. Nothing of this checkpoint was committed",
    )
