"""What the operator knows: every SFTJob, and a slim projection of every object that was made for one.

Watches, lists and the answers of our own writes all end here, in any order: the newest version of an object counts, and
what was deleted does not come back. Nothing here talks to anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

from sft_operator.observed import Gang, Observed, Platform, Pod, PodGroup, PrepareJob, Role
from sft_operator.views import Child, Key, Raw, child, job_key, version

DELETED_KEPT = 20_000
"""How many uids of deleted objects are remembered: those that a slow answer or list may still bring."""


class World:
    """Dictionaries by SFTJob."""

    def __init__(self) -> None:
        self.platform = Platform()
        self._jobs: dict[Key, Raw] = {}
        self._children: dict[Key, dict[str, Child]] = {}
        self._deleted: dict[str, None] = {}

    # ── what comes in ──────────────────────────────────────────────────────────────────────────────────────────

    def put(self, kind: str, raw: Raw) -> Key | None:
        """Take in a version of an object; the SFTJob whose world it changes, none where it is no news."""
        key = job_key(kind, raw)
        if key is None or raw["metadata"]["uid"] in self._deleted:
            return None
        return self._put_job(key, raw) if kind == "SFTJob" else self._put_child(key, kind, raw)

    def remove(self, kind: str, raw: Raw) -> Key | None:
        """Take in that the object is gone, and what it was like at last; the SFTJob whose world that changes."""
        key = job_key(kind, raw)
        if key is None:
            return None
        if kind != "SFTJob":
            self._put_child(key, kind, raw)
        self._drop(key, kind, raw["metadata"]["uid"])
        return key

    def forget(self, key: Key, kind: str, name: str) -> None:
        """The API server says that there is no object of this name."""
        for known in list(self._children.get(key, {}).values()):
            if (known.kind, known.name) == (kind, name):
                self._drop(key, kind, known.uid)

    def forget_job(self, key: Key) -> None:
        """The API server says that there is no such SFTJob."""
        if key in self._jobs:
            self._drop(key, "SFTJob", self._jobs[key]["metadata"]["uid"])

    def prune(self, kind: str, namespace: str | None, listed: Set[str], as_of: int) -> None:
        """Forget what a complete list of version `as_of` does not have, unless it is newer than the list."""
        for key in self.job_keys():
            if namespace not in (None, key[0]):
                continue
            for uid, known_version in self._known(key, kind):
                if uid not in listed and known_version <= as_of:
                    self._drop(key, kind, uid)

    # ── what is known ──────────────────────────────────────────────────────────────────────────────────────────

    def job_keys(self) -> set[Key]:
        """Every SFTJob, and those that are gone but not all of their objects."""
        return {*self._jobs, *self._children}

    def job(self, key: Key) -> Raw | None:
        return self._jobs.get(key)

    def children(self, key: Key) -> tuple[Child, ...]:
        return tuple(self._children.get(key, {}).values())

    def find(self, key: Key, kind: str, name: str) -> Child | None:
        return next((known for known in self.children(key) if (known.kind, known.name) == (kind, name)), None)

    def observed(self, key: Key) -> Observed:
        """What is known of this SFTJob's world without asking."""
        found = [known.projection for known in self.children(key)]
        return Observed(
            platform=self.platform,
            prepare=next((one for one in found if isinstance(one, PrepareJob)), None),
            gangs=tuple(one for one in found if isinstance(one, Gang)),
            pod_groups=tuple(one for one in found if isinstance(one, PodGroup)),
            pods=tuple(one for one in found if isinstance(one, Pod)),
            has_config=any(known.kind == "ConfigMap" for known in self.children(key)),
        )

    # ── within ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _put_job(self, key: Key, raw: Raw) -> Key | None:
        known = self._jobs.get(key)
        if known is not None and version(known) >= version(raw):
            return None
        metadata = {name: value for name, value in raw["metadata"].items() if name != "managedFields"}
        self._jobs[key] = {**raw, "metadata": metadata}
        return key

    def _put_child(self, key: Key, kind: str, raw: Raw) -> Key | None:
        new = child(kind, raw)
        if new is None:
            return None
        for known in self.children(key):
            if (known.kind, known.name) == (kind, new.name) and not is_gone(known):
                if known.version >= new.version:
                    return None
                if known.uid != new.uid:  # a namesake has taken its place, so it is gone
                    self._drop(key, kind, known.uid)
        self._children.setdefault(key, {})[new.uid] = new
        if isinstance(new.projection, Pod):
            self._let_go_before(key, new.projection.attempt)
        return key

    def _drop(self, key: Key, kind: str, uid: str) -> None:
        self._deleted[uid] = None
        if len(self._deleted) > DELETED_KEPT:
            self._deleted.pop(next(iter(self._deleted)))
        if kind == "SFTJob":
            self._drop_job(key, uid)
            return
        children = self._children.get(key, {})
        known = children.pop(uid, None)
        if known is not None and isinstance(known.projection, Pod) and had_something_to_say(known.projection):
            children[uid] = replace(known, projection=replace(known.projection, gone=True))
        self._tidy(key)

    def _drop_job(self, key: Key, uid: str) -> None:
        if key in self._jobs and self._jobs[key]["metadata"]["uid"] == uid:
            del self._jobs[key]
            self._let_go(key, (known for known in self.children(key) if is_gone(known)))

    def _known(self, key: Key, kind: str) -> list[tuple[str, int]]:
        """Uid and version of what is thought to exist."""
        if kind == "SFTJob":
            raw = self._jobs.get(key)
            return [(raw["metadata"]["uid"], version(raw))] if raw is not None else []
        return [(known.uid, known.version) for known in self.children(key) if known.kind == kind and not is_gone(known)]

    def _let_go_before(self, key: Key, attempt: int) -> None:
        """Pods of older attempts that are gone have nothing more to say."""
        older = (known for known in self.children(key) if is_gone(known) and attempt_of(known) < attempt)
        self._let_go(key, older)

    def _let_go(self, key: Key, those: Iterable[Child]) -> None:
        for known in list(those):
            self._children[key].pop(known.uid)
        self._tidy(key)

    def _tidy(self, key: Key) -> None:
        if not self._children.get(key, True):
            del self._children[key]


def had_something_to_say(pod: Pod) -> bool:
    """Whether it shows how its attempt ended, and so is kept when it is deleted."""
    return pod.role is Role.TRAIN and bool(pod.ended or pod.disruption or pod.failed)


def is_gone(known: Child) -> bool:
    return isinstance(known.projection, Pod) and known.projection.gone


def attempt_of(known: Child) -> int:
    return known.projection.attempt if isinstance(known.projection, Pod) else 0
