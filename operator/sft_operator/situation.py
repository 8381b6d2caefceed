"""A job and its world at one moment, as `reconcile` and its policies look at them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from sft_api import labels
from sft_api.job import SFTJob
from sft_api.report import TrainerReport
from sft_api.status import Attempt, ConditionType, SFTJobStatus
from sft_operator.gang import GangChoice, choose_gang
from sft_operator.observed import Gang, Observed, Pod, PodGroup, Role
from sft_operator.restart import said
from sft_operator.settings import Settings


@dataclass(frozen=True)
class Situation:
    """Everything that a decision rests on. `status` is what is known so far; decisions add to it."""

    job: SFTJob
    observed: Observed
    settings: Settings
    now: datetime
    status: SFTJobStatus

    def with_status(self, **changes: Any) -> Situation:
        return replace(self, status=self.status.model_copy(update=changes))

    @cached_property
    def gang_choice(self) -> GangChoice:
        return choose_gang(self.job.spec.scheduling, self.nodes, self.observed.platform)

    @property
    def nodes(self) -> int:
        return self.job.spec.trainer.nodes

    @property
    def last_attempt(self) -> Attempt | None:
        return self.status.attempts[-1] if self.status.attempts else None

    @property
    def attempt(self) -> Attempt | None:
        """The attempt that goes on; none between two of them."""
        last = self.last_attempt
        return last if last is not None and last.ended is None else None

    @property
    def number(self) -> int:
        """Number of the last attempt; 0 before the first."""
        return int(self.last_attempt.name.rpartition("-")[2]) if self.last_attempt else 0

    @property
    def attempt_name(self) -> str:
        return labels.attempt(self.job.metadata.name, self.number)

    @cached_property
    def gang(self) -> Gang | None:
        """What makes the pods of the last attempt."""
        return next((gang for gang in self.observed.gangs if gang.attempt == self.number), None)

    @cached_property
    def pod_group(self) -> PodGroup | None:
        return next((group for group in self.observed.pod_groups if group.name == self.attempt_name), None)

    @cached_property
    def pods(self) -> tuple[Pod, ...]:
        """The last attempt's, in the order of their ranks; those that are gone but had something to say among them."""
        mine = (pod for pod in self.observed.pods if pod.role is Role.TRAIN and pod.attempt == self.number)
        return tuple(sorted(mine, key=lambda pod: (pod.rank, pod.created)))

    @property
    def live_pods(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if not pod.gone)

    @cached_property
    def prepare_pods(self) -> tuple[Pod, ...]:
        """Oldest first."""
        mine = (pod for pod in self.observed.pods if pod.role is Role.PREPARE)
        return tuple(sorted(mine, key=lambda pod: pod.created))

    @cached_property
    def report(self) -> TrainerReport | None:
        """The last attempt's newest words: its account at the end, else what it answered just now."""
        accounts = [account for pod in self.pods if (account := said(pod)) and account.report]
        return accounts[0].report if accounts else self.observed.report

    @property
    def all_running(self) -> bool:
        return sum(pod.is_running for pod in self.pods) == self.nodes

    def holds(self, kind: ConditionType) -> bool:
        """Whether the condition was True when the status was last written."""
        return any(condition.type == kind and condition.status == "True" for condition in self.status.conditions)

    def reason(self, kind: ConditionType) -> str | None:
        """The condition's reason when the status was last written."""
        return next((found.reason for found in self.status.conditions if found.type == kind), None)

    def since(self, kind: ConditionType) -> datetime | None:
        """When the condition came to be as it is."""
        return next((found.last_transition_time for found in self.status.conditions if found.type == kind), None)
