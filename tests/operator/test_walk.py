"""A job through any misfortunes in any order: what must never be, and that it comes to an end once they stop."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sft_api.status import SFTJobStatus, State
from tests.operator.simulator import World
from tests.operator.states.case import named

MAX_RESTARTS = 3
MAX_DISRUPTIONS = 4
RANKS = st.integers(0, 1)
LOOKS_TO_THE_END = 120


class Walk(RuleBasedStateMachine):
    """Each rule is something that happens in a cluster; the operator looks whenever it likes, and may die at it."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        lifecycle = self.world.job.spec.lifecycle
        self.world.wants(
            lifecycle=lifecycle.model_copy(update={"max_restarts": MAX_RESTARTS, "max_disruptions": MAX_DISRUPTIONS})
        )
        self.steps = 0
        self.newest = 0
        self.end: SFTJobStatus | None = None

    @rule(stages=st.sampled_from([3, 3, 3, 3, 2, 1, 0]))
    def the_operator_looks(self, stages: int) -> None:
        if self.world.status.finished is not None and self.end is None:
            self.end = self.world.status
        self.world.look(stages)

    @rule(seconds=st.sampled_from([1, 20, 200, 400]))
    def time_passes(self, seconds: int) -> None:
        self.world.passes(seconds)

    @rule(code=st.sampled_from([None, 0, 0, 0, 33]))
    def the_preparation_goes_on(self, code: int | None) -> None:
        self.world.prepares(code)

    @rule(pods=st.sampled_from([1, 2, 2]))
    def pods_are_made(self, pods: int) -> None:
        self.world.makes_pods(pods)

    @rule()
    def pods_run(self) -> None:
        self.world.runs()

    @rule(steps=st.sampled_from([0, 0, 10]))
    def it_trains(self, steps: int) -> None:
        self.steps += steps
        self.world.trains(self.steps)

    @rule()
    def it_is_done(self) -> None:
        self.world.is_done()

    @rule(rank=RANKS, code=st.sampled_from([0, 1, 10, 14, 30, 31, 32, 33, 137]))
    def a_pod_ends(self, rank: int, code: int) -> None:
        self.world.exits(rank, code)

    @rule(rank=RANKS, why=st.sampled_from([None, "EvictionByEvictionAPI: drained"]), lost=st.booleans())
    def a_pod_is_taken(self, rank: int, why: str | None, lost: bool) -> None:
        self.world.is_taken(rank, why, lost)

    @rule()
    def the_training_operator_tidies(self) -> None:
        self.world.is_tidied()

    @rule()
    def lost_nodes_answer(self) -> None:
        self.world.nodes_answer()

    @precondition(lambda self: self.world.observed.gangs)
    @rule()
    def somebody_deletes_the_gang(self) -> None:
        self.world.delete_gang(self.world.observed.gangs[0].name)

    @rule(suspend=st.booleans())
    def the_user_suspends_or_resumes(self, suspend: bool) -> None:
        self.world.wants(suspend=suspend)

    # ── what must never be ──

    @invariant()
    def two_attempts_are_never_there_at_once(self) -> None:
        observed = self.world.observed
        assert len({gang.attempt for gang in observed.gangs} | {pod.attempt for pod in self.world.live_pods}) <= 1

    @invariant()
    def the_numbers_of_attempts_only_grow(self) -> None:
        numbers = [int(attempt.name.rpartition("-")[2]) for attempt in self.world.status.attempts]
        assert numbers == sorted(set(numbers))
        assert max(numbers, default=0) >= self.newest
        self.newest = max(numbers, default=0)

    @invariant()
    def budgets_are_kept(self) -> None:
        assert (self.world.status.restarts or 0) <= MAX_RESTARTS + 1
        assert (self.world.status.disruptions or 0) <= MAX_DISRUPTIONS + 1

    @invariant()
    def only_the_last_attempt_goes_on(self) -> None:
        assert all(attempt.ended for attempt in self.world.status.attempts[:-1])

    @invariant()
    def a_suspended_job_holds_no_pods(self) -> None:
        if self.world.status.state is State.SUSPENDED and self.world.job.spec.suspend:
            assert not self.world.observed.gangs

    @invariant()
    def an_end_is_an_end(self) -> None:
        if self.end is not None:
            status = self.world.status
            assert (status.state, status.finished) == (self.end.state, self.end.finished)
            assert [attempt.reason for attempt in status.attempts] == [attempt.reason for attempt in self.end.attempts]

    # ── and what must come about ──

    def teardown(self) -> None:
        self.world.wants(suspend=False)
        for _ in range(LOOKS_TO_THE_END):
            if self.world.status.finished is not None:
                break
            self.all_goes_well()
        assert self.world.status.state in (State.SUCCEEDED, State.FAILED), self.world.status
        for _ in range(10):
            self.all_goes_well()
        assert not [pod.name for pod in self.world.live_pods if pod.is_running]
        assert not self.world.look().delete

    def all_goes_well(self) -> None:
        world = self.world
        made = [named(manifest) for manifest in world.look().apply]
        assert world.status.finished is None or not made
        world.prepares(0)
        world.makes_pods()
        world.runs()
        world.is_done()
        world.is_tidied()
        world.passes(20)


Walk.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_any_misfortunes_in_any_order = Walk.TestCase
