"""One row of the table: a state of the world, and the decision that it must get."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_api.job import SFTJob
from sft_api.status import Attempt, SFTJobStatus, State
from sft_operator.observed import Decision, Manifest, ObjectRef, Observed
from tests.operator.builders import make_job

Says = Mapping[str, tuple[str, str, str]]
"""By condition: status, reason, message; … in a message stands for anything."""
CONFIG = ("ConfigMap/granite-run",)


@dataclass(frozen=True)
class Case:
    """What is given, then what is expected. What is not said of a decision must not be in it."""

    name: str
    observed: Observed
    status: SFTJobStatus | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    state: State | None = None
    says: Says = field(default_factory=dict)
    applied: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    """`Kind/name`, with ` now` where no node is waited for."""
    attempts: tuple[str, ...] = ()
    """`name`, with ` reason` where it has ended."""
    counts: tuple[int, int] = (0, 0)
    """Restarts and disruptions."""
    again: float | None = 10.0
    steps: int = 1
    """How many decisions it takes until nothing is left to do: more than one where the first asks for the next."""

    @property
    def job(self) -> SFTJob:
        return make_job(self.spec, self.status, self.metadata)

    def check(self, decision: Decision) -> None:
        status = decision.status
        assert status.state == self.state
        for kind, expected in self.says.items():
            check_condition(status, kind, expected)
        assert tuple(map(named, decision.apply)) == self.applied
        assert tuple(map(spelled, decision.delete)) == self.deleted
        assert tuple(map(told, status.attempts)) == self.attempts
        assert (status.restarts or 0, status.disruptions or 0) == self.counts
        assert decision.again_seconds == self.again


def check_condition(status: SFTJobStatus, kind: str, expected: tuple[str, str, str]) -> None:
    [found] = [condition for condition in status.conditions if condition.type == kind]
    truth, reason, message = expected
    pattern = ".*".join(map(re.escape, message.split("…")))
    assert (found.status, found.reason) == (truth, reason), f"{kind}: {found}"
    assert re.fullmatch(pattern, found.message, re.DOTALL), f"{kind}: {found.message!r} is not {message!r}"


def named(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def spelled(ref: ObjectRef) -> str:
    return f"{ref.kind}/{ref.name}{' now' if ref.force else ''}"


def told(attempt: Attempt) -> str:
    return f"{attempt.name} {attempt.reason}" if attempt.ended else attempt.name
