"""Why an attempt ended, and whether there is to be another: causes, budgets, back-off. Pure.

what ended it                                              costs         next
eviction, preemption, lost node, exit 30, pod deleted      a disruption  another attempt
exit 31, 32, 33, a signal, OOMKilled, anything else        a restart     another attempt
exit 10 to 15                                              the job       none: it would end the same way again
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import ValidationError

from sft_api.pods import Lifecycle
from sft_api.report import Termination
from sft_api.run import PERMANENT, ExitCode
from sft_api.status import Attempt, SFTJobStatus
from sft_operator.observed import Ended, Gang, Pod

SETTLE = timedelta(seconds=15)
"""How long the cause is waited for after a rank lost its peers, for the first pod to end is rarely to blame; and after
the PyTorchJob ended, for a word of its pods."""
FIRST_BACK_OFF_SECONDS = 10.0
LONGEST_BACK_OFF_SECONDS = 300.0
LAST_SIGNAL = 64


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended."""

    reason: str
    """In one CamelCase word."""
    message: str
    disruption: bool | None = False
    """It was taken away; it did not fail. None: neither, it was asked to end or done."""
    permanent: bool = False
    """Another attempt would end the same way."""
    pod: str | None = None
    """The pod that shows it."""
    finished: datetime | None = None
    """When that pod ended."""
    leaving: bool = False
    """That pod was on its way out, perhaps because of another's end."""

    @property
    def is_a_complaint(self) -> bool:
        """Of a rank that lost its peers: believed only when nothing better is known."""
        return self.reason == reason_of(ExitCode.COMMUNICATION)


def find_cause(gang: Gang | None, pods: Sequence[Pod], attempt: Attempt, now: datetime) -> Cause | None:
    """Why the attempt with these pods has ended; none while it goes on, or while that is not clear yet."""
    if gang is not None and gang.queued:
        return taken_back(pods, attempt)
    causes = sorted((cause for pod in pods if (cause := cause_in(pod))), key=likelihood)
    if not causes:
        return cause_in_gang(gang, pods, attempt.name, now)
    return None if another_may_know(causes[0], pods, now) else causes[0]


def taken_back(pods: Sequence[Pod], attempt: Attempt) -> Cause | None:
    """A gang that is back in its queue though it had begun; none where it has not left the queue yet."""
    if attempt.running is None and not any(pod.ended for pod in pods):
        return None
    return Cause("Preempted", f"the queue took {attempt.name} back", disruption=True)


def another_may_know(cause: Cause, pods: Sequence[Pod], now: datetime) -> bool:
    """Whether a pod that still runs may yet say better why the ranks lost each other."""
    if not cause.is_a_complaint or cause.finished is None:
        return False
    return any(pod.is_running for pod in pods) and now - cause.finished < SETTLE


def cause_in_gang(gang: Gang | None, pods: Sequence[Pod], name: str, now: datetime) -> Cause | None:
    """What is known of the end where no pod shows a cause."""
    if gang is None:
        return Cause("Deleted", f"the PyTorchJob {name} was deleted by somebody else", disruption=True)
    if gang.deleting:
        return Cause("Deleted", f"the PyTorchJob {name} is being deleted by somebody else", disruption=True)
    if gang.ended is not None and now - gang.ended < SETTLE:
        return None  # pods are watched apart from what makes them: their own words may come later
    if gang.failed and (taken := [pod.name for pod in pods if pod.deleting or pod.gone]):
        return Cause("PodDeleted", f"pod {taken[0]} was deleted", disruption=True, pod=taken[0])
    if gang.failed:
        return Cause("Failed", f"the PyTorchJob {name} failed, and no pod says why: {gang.failed}")
    if gang.succeeded:
        return Cause("Incomplete", f"the master of {name} ended well, and no final checkpoint was reported")
    return None


def likelihood(cause: Cause) -> int:
    """0 is the likeliest cause: what is permanent, then what was taken away, then what failed, then who lost it.

    A pod that was told to stop on its way out is believed after one that failed: the training operator takes the
    others of a failed gang away.
    """
    if cause.permanent:
        return 0
    if cause.disruption:
        return 3 if cause.leaving else 1
    return 4 if cause.is_a_complaint else 2


def cause_in(pod: Pod) -> Cause | None:
    """What this pod shows of the end of its attempt; none where it shows nothing."""
    leaving = pod.deleting is not None or pod.gone
    if pod.disruption and not (pod.ended and pod.ended.exit_code == 0):
        where = f" on node {pod.node}" if pod.node else ""
        return Cause("Disrupted", f"pod {pod.name}{where}: {pod.disruption}", disruption=True, pod=pod.name)
    if pod.ended is not None:
        return cause_of_exit(pod, pod.ended, leaving)
    if pod.failed and not leaving:
        return Cause("PodFailed", f"pod {pod.name} failed before its container ran: {pod.failed}", pod=pod.name)
    return None


def cause_of_exit(pod: Pod, ended: Ended, leaving: bool) -> Cause | None:
    """What the way in which its container ended shows; none where it shows nothing."""
    code, reason = ended.exit_code, reason_in(ended)
    if code == ExitCode.PREEMPTED:
        message = f"pod {pod.name} was told to stop: {words(pod)}"
        return Cause(reason, message, disruption=True, pod=pod.name, finished=ended.finished, leaving=leaving)
    permanent = code in PERMANENT
    if code == 0 or (leaving and not permanent):
        return None  # terminated pods end in all ways on their way out
    message = f"pod {pod.name} ended with exit code {code} ({reason}): {words(pod)}"
    return Cause(reason, message, permanent=permanent, pod=pod.name, finished=ended.finished, leaving=leaving)


def reason_in(ended: Ended) -> str:
    """Why a container ended, in one word: what the kubelet knows of its memory, else the exit code's name."""
    return ended.reason if ended.reason == "OOMKilled" else reason_of(ended.exit_code)


def reason_of(code: int) -> str:
    """The exit code's name in the spelling of reasons."""
    known = {member.value: "".join(word.title() for word in member.name.split("_")) for member in ExitCode}
    return known.get(code, "Killed" if 128 < code <= 128 + LAST_SIGNAL else "Failed")


def said(pod: Pod) -> Termination | None:
    """What the pod's launcher left as its account; none where it left none."""
    if pod.ended is None or not pod.ended.message:
        return None
    try:
        return Termination.model_validate_json(pod.ended.message)
    except ValidationError:
        return None


def words(pod: Pod) -> str:
    """The last words of a pod, for a person."""
    account = said(pod)
    if account is not None:
        return account.message
    assert pod.ended is not None
    return pod.ended.message.strip()[-1024:] or f"{pod.ended.reason}; it left no message"


def give_up(cause: Cause, restarts: int, disruptions: int, lifecycle: Lifecycle) -> str | None:
    """Why there is no further attempt after this cause, which the counts include; none where there is."""
    if cause.permanent:
        return cause.message
    if cause.disruption and disruptions > lifecycle.max_disruptions:
        return (
            f"disrupted {disruptions} times, and spec.lifecycle.maxDisruptions is {lifecycle.max_disruptions};"
            f" last: {cause.message}"
        )
    if not cause.disruption and restarts > lifecycle.max_restarts:
        return (
            f"failed {restarts} times without a newer checkpoint, and spec.lifecycle.maxRestarts is"
            f" {lifecycle.max_restarts}; last: {cause.message}"
        )
    return None


def is_progress(status: SFTJobStatus, checkpoint_step: int) -> bool:
    """Whether this checkpoint is newer than any that was known: then failures are counted anew."""
    known = [attempt.checkpoint_step or 0 for attempt in status.attempts]
    return checkpoint_step > max([*known, status.checkpoint.step if status.checkpoint else 0])


def back_off_seconds(attempts: Iterable[Attempt]) -> float:
    """How long to wait after the last of these: doubled for each in a row that brought no newer checkpoint."""
    steps = [attempt.checkpoint_step or 0 for attempt in attempts if attempt.ended and attempt.disruption is not None]
    fruitless = 0
    for before, after in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
        if after > before:
            break
        fruitless += 1
    return min(FIRST_BACK_OFF_SECONDS * 2.0**fruitless, LONGEST_BACK_OFF_SECONDS)
