"""A job through any misfortunes in any order: what must never be, and that it comes to an end once they stop."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sft_api.status import SFTJobStatus, State
from tests.operator.simulator import World

MAX_RESTARTS = 3
MAX_DISRUPTIONS = 4
LOOKS_TO_THE_END = 100


def deletes_its_gang(world: World) -> None:
    for gang in world.observed.gangs:
        world.delete_gang(gang.name)


EVENTS: dict[str, tuple[Callable[[World], None], int]] = {
    "1 s passes": (lambda world: world.passes(1), 2),
    "20 s pass": (lambda world: world.passes(20), 4),
    "400 s pass": (lambda world: world.passes(400), 2),
    "what was told to end ends": (World.obeys, 4),
    "the preparation begins": (lambda world: world.prepares(None), 2),
    "the data is prepared": (lambda world: world.prepares(0), 4),
    "the data is wrong": (lambda world: world.prepares(11), 1),
    "one pod is made": (lambda world: world.makes_pods(1), 2),
    "the pods are made": (World.makes_pods, 4),
    "the pods run": (World.runs, 6),
    "it trains": (World.trains, 4),
    "it commits a checkpoint": (lambda world: world.trains(10), 4),
    "it is done": (World.is_done, 2),
    **{
        f"the {pod} ends with {code}": (lambda world, rank=rank, code=code: world.exits(rank, code), 1)
        for rank, pod in enumerate(("master", "worker"))
        for code in (0, 1, 10, 30, 31, 32, 137)
    },
    "the worker is evicted": (lambda world: world.is_taken(1, "EvictionByEvictionAPI: drained"), 2),
    "the master is deleted": (lambda world: world.is_taken(0, None), 2),
    "a node is lost": (lambda world: world.is_taken(1, "DeletionByTaintManager: lost", node_is_lost=True), 2),
    "the lost node answers": (World.nodes_answer, 2),
    "the training operator tidies": (World.is_tidied, 4),
    "somebody deletes the gang": (deletes_its_gang, 2),
    "the user suspends": (lambda world: world.wants(suspend=True), 1),
    "the user resumes": (lambda world: world.wants(suspend=False), 4),
}
"""What happens in a cluster, and how often."""
STEPS = st.tuples(
    st.sampled_from([name for name, (_, weight) in EVENTS.items() for _ in range(weight)]),
    st.sampled_from([3, 3, 3, 3, 3, 2, 1, 0]),  # how far the operator comes after it, before it dies
)


@settings(max_examples=150, derandomize=True, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
@given(st.lists(STEPS, min_size=40, max_size=80))
def test_any_misfortunes_in_any_order(steps: list[tuple[str, int]]) -> None:
    world = make_world()
    for name, stages in steps:
        before = world.status
        happens, _ = EVENTS[name]
        happens(world)
        world.look(stages)
        check(world)
        check_sequence(before, world.status)
    check_that_it_ends(world)


def make_world() -> World:
    world = World()
    limits = {"max_restarts": MAX_RESTARTS, "max_disruptions": MAX_DISRUPTIONS}
    world.wants(lifecycle=world.job.spec.lifecycle.model_copy(update=limits))
    return world


def check(world: World) -> None:
    """What must never be. That no attempt is begun beside the pods of another, the world itself sees to."""
    status = world.status
    there = {gang.attempt for gang in world.observed.gangs} | {pod.attempt for pod in world.live_pods}
    assert len(there) <= 1
    assert number_of(status) >= max(there, default=0) or status.finished is None
    assert (status.restarts or 0) <= MAX_RESTARTS + 1
    assert (status.disruptions or 0) <= MAX_DISRUPTIONS + 1
    assert all(attempt.ended for attempt in status.attempts[:-1])
    assert status.finished is None or all(attempt.ended for attempt in status.attempts)
    if status.state is State.SUSPENDED and world.job.spec.suspend:
        assert not there


def check_sequence(before: SFTJobStatus, after: SFTJobStatus) -> None:
    """What must never follow: a number of an attempt given twice, or an end that is none."""
    assert number_of(after) - number_of(before) in (0, 1)
    if before.finished is not None:
        assert (after.state, after.finished) == (before.state, before.finished)
        assert [attempt.ended for attempt in after.attempts] == [attempt.ended for attempt in before.attempts]


def number_of(status: SFTJobStatus) -> int:
    return int(status.attempts[-1].name.rpartition("-")[2]) if status.attempts else 0


def check_that_it_ends(world: World) -> None:
    """Nothing bad happens any more: the job succeeds, or has failed, and then nothing of it runs."""
    world.wants(suspend=False)
    for _ in range(LOOKS_TO_THE_END):
        if world.status.finished is None:
            all_goes_well(world)
    assert world.status.state in (State.SUCCEEDED, State.FAILED), world.status
    for _ in range(20):
        all_goes_well(world)
    assert not [pod.name for pod in world.live_pods if pod.is_running]
    decision = world.look()
    assert (decision.apply, decision.delete) == ((), ())


def all_goes_well(world: World) -> None:
    world.look()
    world.prepares(0)
    world.makes_pods()
    world.runs()
    world.is_done()
    world.is_tidied()
    world.obeys()
    world.passes(20)
