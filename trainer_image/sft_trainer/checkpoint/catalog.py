"""Which checkpoints a store holds, which of them is the newest that is whole, and whether it is this run's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import ValidationError

from sft_api import names
from sft_api.base import ApiModel
from sft_api.run import ExitCode, RunError
from sft_trainer.checkpoint.reader import Checkpoint
from sft_trainer.checkpoint.records import Manifest, Marker
from sft_trainer.checkpoint.retention import Committed
from sft_trainer.store import ObjectInfo, ObjectMissing, Store

Place = tuple[int, int]
"""Step and attempt of a checkpoint. A later attempt's checkpoint of the same step counts as newer."""


class Damaged(Exception):
    """A checkpoint says that it is complete and is not what it says. The message names the object."""


class CheckpointSummary(ApiModel):
    """A row of `sft checkpoints`. What only a committed checkpoint knows is null for the others."""

    step: int
    attempt: int
    phase: str | None = None
    epoch: int | None = None
    samples: int | None = None
    complete: bool
    """COMPLETE is there. Others are on their way, or were left by an attempt that died."""
    verified: bool | None = None
    """Every byte was read and its checksum holds. Null: not asked for, or not complete."""
    world_size: int | None = None
    zero_stage: int | None = None
    bytes: int
    """Of all its objects, as listed."""
    time: float
    """Unix time of its newest object."""
    parameters_digest: str | None = None
    problem: str | None = None
    """What is wrong with a complete checkpoint, naming the object."""


def newest_complete(
    store: Store,
    fingerprints: Mapping[str, str] | None = None,
    warn: Callable[[str], None] = lambda _: None,
    verify: Callable[[Checkpoint], str | None] = Checkpoint.verify,
    places: Sequence[Place] | None = None,
) -> Checkpoint | None:
    """The newest complete checkpoint whose checksums hold; None if there is none. `store`: at checkpoints.uri.

    A damaged one is passed over for the next older, and `warn` told which and why. `fingerprints`: the run's; RunError
    if the checkpoint is of another run. `verify`: what is wrong with the state, or None; a gang may share the reading.
    `places`: what to try, for a gang whose ranks' own listings could differ.
    """
    for place in complete_places(store) if places is None else places:
        try:
            checkpoint = open_checkpoint(store, *place)
            if fingerprints is not None:
                _check_belongs(checkpoint, fingerprints)
            if problem := verify(checkpoint):
                raise Damaged(problem)
        except Damaged as damage:
            warn(f"the checkpoint of step {place[0]} is damaged and passed over for the one before it: {damage}")
        else:
            return checkpoint
    return None


def complete_places(store: Store) -> list[Place]:
    """Where complete checkpoints are, the newest first."""
    return sorted(_by_place(store.list(names.CHECKPOINTS), complete=True), reverse=True)


def open_checkpoint(store: Store, step: int, attempt: int) -> Checkpoint:
    """The complete checkpoint at that place, its manifest checked, its state not. Raises Damaged."""
    folder = store.child(names.checkpoint(step, attempt))
    try:
        marker = Marker.model_validate_json(folder.get(names.COMPLETE))
        body = folder.get(names.MANIFEST)
        manifest = Manifest.model_validate_json(body)
    except ObjectMissing as missing:
        raise Damaged(f"{missing} is missing") from missing
    except ValidationError as error:
        raise Damaged(f"{names.MANIFEST} or {names.COMPLETE} at {folder.uri} cannot be read: {error}") from error
    if hashlib.sha256(body).hexdigest() != marker.manifest_sha256:
        raise Damaged(f"{folder.uri}/{names.MANIFEST} is not the one that was committed: its checksum is another")
    if (manifest.meta.step, manifest.attempt) != (step, attempt):
        raise Damaged(f"{folder.uri}/{names.MANIFEST} is of step {manifest.meta.step}, attempt {manifest.attempt}")
    return Checkpoint(folder, manifest, marker.time)


def list_checkpoints(store: Store, verify: bool) -> list[CheckpointSummary]:
    """Every checkpoint under checkpoints.uri, complete or not, oldest first. `verify` reads every byte."""
    found = _by_place(store.list(names.CHECKPOINTS))
    return [_summary(store, place, found[place], verify) for place in sorted(found)]


def committed(store: Store) -> list[Committed]:
    """The complete checkpoints, as retention wants to know them. One that cannot be read is plain: no phase end."""
    found = []
    for step, attempt in _by_place(store.list(names.CHECKPOINTS), complete=True):
        try:
            meta = open_checkpoint(store, step, attempt).meta
        except Damaged:
            found.append(Committed(step, attempt))
        else:
            found.append(Committed(step, attempt, meta.phase_end, meta.validation_loss))
    return found


def _by_place(objects: Iterable[ObjectInfo], complete: bool = False) -> dict[Place, list[ObjectInfo]]:
    """The objects of each checkpoint; `complete`: of those with a marker only."""
    found: dict[Place, list[ObjectInfo]] = {}
    for info in objects:
        if place := names.parse_checkpoint(info.key):
            found.setdefault(place, []).append(info)
    return {place: infos for place, infos in found.items() if not complete or _has_marker(infos)}


def _has_marker(infos: Iterable[ObjectInfo]) -> bool:
    return any(info.key.endswith(f"/{names.COMPLETE}") for info in infos)


def _summary(store: Store, place: Place, infos: list[ObjectInfo], verify: bool) -> CheckpointSummary:
    bare = CheckpointSummary(
        step=place[0],
        attempt=place[1],
        complete=_has_marker(infos),
        bytes=sum(info.size for info in infos),
        time=max(info.modified.timestamp() for info in infos),
    )
    if not bare.complete:
        return bare
    try:
        checkpoint = open_checkpoint(store, *place)
    except Damaged as damage:
        return bare.model_copy(update={"verified": False, "problem": str(damage)})
    meta = checkpoint.meta
    problem = checkpoint.verify() if verify else None
    return bare.model_copy(
        update={
            "phase": meta.phase,
            "epoch": meta.epoch,
            "samples": meta.samples,
            "verified": problem is None if verify else None,
            "world_size": meta.world_size,
            "zero_stage": meta.zero_stage,
            "parameters_digest": checkpoint.parameters_digest,
            "problem": problem,
        }
    )


def _check_belongs(checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> None:
    theirs = checkpoint.meta.fingerprints
    differing = sorted(key for key in {*theirs, *fingerprints} if theirs.get(key) != fingerprints.get(key))
    if differing:
        raise RunError(
            ExitCode.CONFIGURATION,
            f"{checkpoint.uri} is a checkpoint of another run: its {', '.join(differing)} differ from this run's. "
            "Give this run a checkpoints.uri of its own, or undo the change to go on with the old one",
            "spec.checkpoints.uri",
        )
