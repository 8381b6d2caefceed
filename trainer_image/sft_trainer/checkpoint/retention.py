"""Which checkpoints to delete, and deleting them so that none is ever half there and called complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft_api import names
from sft_api.spec import Keep
from sft_trainer.store import Store


@dataclass(frozen=True, order=True)
class Committed:
    """A complete checkpoint, as far as keeping it goes."""

    step: int
    attempt: int
    phase_end: bool = False
    validation_loss: float | None = None


@dataclass(frozen=True)
class Lineage:
    """Which checkpoints the state in memory descends from: this attempt's, and those up to where it began."""

    attempt: int
    resumed_from: int | None
    """Step of the checkpoint that this attempt went on from; None if it began at the beginning."""

    def holds(self, checkpoint: Committed) -> bool:
        inherited = self.resumed_from is not None and checkpoint.step <= self.resumed_from
        return checkpoint.attempt == self.attempt or (checkpoint.attempt < self.attempt and inherited)


def surplus(complete: Sequence[Committed], keep: Keep, lineage: Lineage, newest: Committed) -> list[Committed]:
    """The complete checkpoints to delete, oldest first, now that `newest` is committed. `newest` is never one.

    Counted are only those that the present state descends from. Others (damaged ones that were passed over, those of
    an attempt that was overtaken) must not push good ones out; they go when the run has passed their step.
    Those of a later attempt are not ours to touch.
    """
    ours = {c.step: c for c in sorted(complete) if lineage.holds(c)}  # of two at one step, the later attempt's
    steps = sorted(ours)
    kept = {newest.step, *steps[-keep.last :]}
    if keep.phase_ends:
        kept |= {step for step in steps if ours[step].phase_end}
    scored = [(c.validation_loss, step) for step, c in ours.items() if c.validation_loss is not None]
    kept |= {step for _, step in sorted(scored)[: keep.best]}
    passed = [c for c in complete if c.attempt < lineage.attempt and c.step <= newest.step]
    candidates = {*ours.values(), *passed} - {ours[step] for step in kept if step in ours} - {newest}
    return sorted(candidates)


def leftovers(store: Store, lineage: Lineage, newest: Committed) -> list[tuple[int, int]]:
    """Step and attempt of the folders without COMPLETE that nobody will complete any more.

    Those of earlier attempts, which may commit nothing since this one began, and this attempt's own of earlier steps
    (a deletion that was cut off: one save is in flight at a time).
    """
    places = []
    for step_folder in store.folders(names.CHECKPOINTS):
        for folder in store.folders(step_folder):
            place = names.parse_checkpoint(folder + "/")
            if place and _is_dead(place, lineage, newest) and store.head(f"{folder}/{names.COMPLETE}") is None:
                places.append(place)
    return places


def _is_dead(place: tuple[int, int], lineage: Lineage, newest: Committed) -> bool:
    step, attempt = place
    return attempt < lineage.attempt or (attempt == lineage.attempt and step < newest.step)


def delete_checkpoint(store: Store, step: int, attempt: int) -> None:
    """Delete the marker, then the rest: cut off in between, it leaves something that was never complete."""
    folder = names.checkpoint(step, attempt)
    store.delete([folder + names.COMPLETE])
    store.delete([info.key for info in store.list(folder)])
    store.sweep(folder)
