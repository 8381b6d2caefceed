"""How a command ended: what each rank says of its own end, the likeliest cause among them, and the words for others."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from sft_api.events import Finished
from sft_api.report import TERMINATION_BYTES, Termination, TrainerReport
from sft_api.run import ExitCode
from sft_api.status import PlanStatus

SHORTEST_MESSAGE = 256
"""Of a termination message that has to be shortened."""


class Account(BaseModel):
    """What a rank says of its own end, in `account-<rank>.json` of the work folder."""

    code: int
    message: str
    step: int | None = None
    checkpoint_step: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a command ended; of a gang, its ranks on this machine."""

    code: int
    message: str
    rank: int | None = None
    step: int | None = None
    checkpoint_step: int | None = None
    report: TrainerReport | None = None
    """What the first rank last knew, where it is on this machine."""
    plan: PlanStatus | None = None
    """What the preparation found."""


@dataclass(frozen=True)
class End:
    """How one rank ended: its exit code (negative: the signal), whether we killed it, and what it said itself."""

    code: int
    killed_by_us: bool
    account: Account | None


def cause(ends: list[End], first_rank: int) -> Outcome:
    """The outcome of the gang: what stopped the first rank, rather than the complaints of those it left behind."""
    local = min(range(len(ends)), key=lambda index: (distance_from_cause(ends[index]), index))
    end, rank = ends[local], first_rank + local
    if end.account is not None and end.account.code == end.code:
        return Outcome(end.code, end.account.message, rank, end.account.step, end.account.checkpoint_step)
    if end.code < 0:
        return Outcome(128 - end.code, f"rank {rank} was killed by {signal.Signals(-end.code).name}", rank)
    if end.code > 0:
        return Outcome(end.code, f"rank {rank} ended with exit code {end.code}; its last words are in the log", rank)
    return Outcome(0, "completed", rank)


def distance_from_cause(end: End) -> int:
    """0 is the likeliest cause. A rank that lost its peers complains of communication: believe it last."""
    if end.code == 0:
        return 4
    if end.killed_by_us:
        return 3
    if end.account is not None and end.account.code == ExitCode.COMMUNICATION:
        return 2
    if end.account is not None and end.account.code == ExitCode.PREEMPTED:
        return 1
    return 0


def read_account(work: Path, rank: int) -> Account | None:
    path = work / f"account-{rank}.json"
    return Account.model_validate_json(path.read_text()) if path.exists() else None


def write_account(work: Path, rank: int, account: Account) -> None:
    """Called by a rank at its end; whole or not at all."""
    partial = work / f".account-{rank}.json"
    partial.write_text(account.model_dump_json())
    partial.rename(work / f"account-{rank}.json")


def reason(code: int) -> str:
    """The exit code's name in the spelling of Kubernetes reasons."""
    known = {member.value: "".join(word.title() for word in member.name.split("_")) for member in ExitCode}
    return known.get(code, "Stopped" if code == 128 + signal.SIGINT else "Failed")


def finished(outcome: Outcome) -> Finished:
    return Finished(
        exit_code=outcome.code,
        reason=reason(outcome.code),
        message=outcome.message,
        rank=outcome.rank,
        step=outcome.step,
        checkpoint_step=outcome.checkpoint_step,
    )


def termination_message(outcome: Outcome) -> str:
    """What a kubelet is to keep of the end: JSON of at most TERMINATION_BYTES, shortened where it must be."""
    termination = Termination(
        exit_code=outcome.code,
        reason=reason(outcome.code),
        message=outcome.message[:TERMINATION_BYTES],
        rank=outcome.rank,
        step=outcome.step,
        checkpoint_step=outcome.checkpoint_step,
        report=outcome.report,
        plan=outcome.plan,
    )
    while (excess := len(as_json(termination).encode()) - TERMINATION_BYTES) > 0:
        termination = shorter(termination, excess)
    return as_json(termination)


def as_json(termination: Termination) -> str:
    return termination.model_dump_json(by_alias=True, exclude_none=True)


def shorter(termination: Termination, excess: int) -> Termination:
    """Without one of the plan's phases; when none is left with a shorter message; and at last without the report."""
    plan, message = termination.plan, termination.message
    if plan is not None and plan.phases:
        fewer = plan.model_copy(update={"phases": plan.phases[:-1]})
        return termination.model_copy(update={"plan": fewer})
    if len(message) > SHORTEST_MESSAGE:
        cut = message[: max(SHORTEST_MESSAGE - 1, len(message) - excess - len(" …".encode()))] + "…"
        return termination.model_copy(update={"message": cut})
    assert termination.report is not None
    return termination.model_copy(update={"report": None})
