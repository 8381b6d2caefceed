"""An attempt that is still alive beside a later one finds out and stops."""

from __future__ import annotations

from sft_api import names
from sft_api.run import ExitCode, RunError
from sft_trainer.store import Store


def check_not_superseded(store: Store, attempt: int) -> None:
    """Raises RunError when a later attempt has taken its number under checkpoints.uri."""
    numbers = (names.parse_attempt(info.key) for info in store.list(names.ATTEMPTS))
    newest = max((number for number in numbers if number is not None), default=0)
    if newest > attempt:
        raise RunError(
            ExitCode.CONFIGURATION,
            f"attempt {newest} at this run has begun under {store.uri}, so attempt {attempt} stops here and commits "
            "nothing more: run one at a time, or give each run its own checkpoints.uri",
            "spec.checkpoints.uri",
        )
