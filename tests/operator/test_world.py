"""What the operator knows, after watches, lists and answers came in whatever order."""

from __future__ import annotations

from sft_api import labels
from sft_operator.observed import Gang
from sft_operator.views import Key
from sft_operator.world import DELETED_KEPT, World
from tests.operator import raw

LAB = Key("team", "lab")


def at(version: int, given: raw.Raw) -> raw.Raw:
    given["metadata"]["resourceVersion"] = str(version)
    return given


def names(world: World) -> list[tuple[str, bool]]:
    return [(pod.name, pod.gone) for pod in world.observed(LAB).pods]


def test_every_kind_is_observed_at_its_place() -> None:
    world = World()
    for kind, given in {
        "SFTJob": raw.job(),
        "PyTorchJob": raw.gang(),
        "Job": raw.prepare_job(),
        "Pod": raw.pod(),
        "PodGroup": raw.pod_group(),
        "ConfigMap": raw.config_map(),
    }.items():
        assert world.put(kind, given) == LAB
    observed = world.observed(LAB)
    assert observed.prepare is not None
    assert [len(found) for found in (observed.gangs, observed.pods, observed.pod_groups)] == [1, 1, 1]
    assert observed.has_config
    assert world.job(LAB) is not None
    assert world.job_keys() == {LAB}


def test_a_version_that_is_known_already_is_no_news() -> None:
    world = World()
    assert world.put("Pod", at(5, raw.running())) == LAB
    assert world.put("Pod", at(5, raw.running())) is None
    assert world.put("SFTJob", at(5, raw.job())) == LAB
    assert world.put("SFTJob", at(5, raw.job())) is None


def test_an_older_version_that_comes_late_changes_nothing() -> None:
    world = World()
    world.put("Pod", at(9, raw.running()))
    assert world.put("Pod", at(8, raw.pod())) is None
    assert world.observed(LAB).pods[0].phase == "Running"
    world.put("SFTJob", at(12, raw.job()))
    world.put("SFTJob", at(11, raw.job()))
    assert world.job(LAB)["metadata"]["resourceVersion"] == "12"  # type: ignore[index]


def test_versions_are_compared_as_numbers() -> None:
    world = World()
    world.put("Pod", at(9, raw.pod()))
    world.put("Pod", at(10, raw.running()))
    assert world.observed(LAB).pods[0].phase == "Running"


def test_what_was_deleted_does_not_come_back_with_a_late_answer() -> None:
    world = World()
    world.put("PyTorchJob", at(5, raw.gang()))
    assert world.remove("PyTorchJob", at(7, raw.gang())) == LAB
    assert world.put("PyTorchJob", at(6, raw.gang())) is None
    assert world.observed(LAB).gangs == ()
    assert world.job_keys() == set()


def test_an_object_of_the_same_name_that_is_made_anew_takes_the_place_of_the_old() -> None:
    world = World()
    world.put("PyTorchJob", at(5, raw.gang(uid="old")))
    world.put("PyTorchJob", at(9, raw.gang(uid="new")))
    assert world.put("PyTorchJob", at(6, raw.gang(uid="old"))) is None
    assert [gang.uid for gang in world.observed(LAB).gangs] == ["new"]


def test_a_late_deletion_of_the_old_leaves_the_new_of_the_same_name() -> None:
    world = World()
    world.put("SFTJob", at(9, raw.job()))
    world.put("PyTorchJob", at(9, raw.gang(uid="new")))
    world.remove("PyTorchJob", at(8, raw.gang(uid="old")))
    old = at(8, raw.job())
    old["metadata"]["uid"] = "an older job's"
    world.remove("SFTJob", old)
    assert [gang.uid for gang in world.observed(LAB).gangs] == ["new"]
    assert world.job(LAB) is not None


def test_a_pod_that_is_gone_stays_known_if_it_showed_how_its_attempt_ended() -> None:
    world = World()
    world.put("Pod", raw.running())
    world.put("Pod", raw.running(rank=1))
    world.remove("Pod", raw.ended(14, message="no memory"))
    world.remove("Pod", raw.running(rank=1))
    [pod] = world.observed(LAB).pods
    assert (pod.name, pod.gone, pod.ended and pod.ended.message) == ("lab-1-master-0", True, "no memory")


def test_a_pod_that_a_lost_node_took_along_stays_known() -> None:
    world = World()
    taken = raw.condition("DisruptionTarget", "True", "DeletionByTaintManager", "")
    world.remove("Pod", raw.pod(status={"phase": "Running", "conditions": [taken]}))
    assert names(world) == [("lab-1-master-0", True)]


def test_a_prepare_pod_that_is_gone_is_forgotten() -> None:
    world = World()
    given = raw.ended(0)
    given["metadata"]["labels"] |= {labels.ROLE: "prepare", labels.ATTEMPT: "0"}
    world.remove("Pod", given)
    assert world.job_keys() == set()


def test_pods_that_are_gone_are_forgotten_when_the_next_attempt_has_one() -> None:
    world = World()
    world.remove("Pod", raw.ended(1))
    world.put("Pod", raw.pod(attempt=2))
    assert names(world) == [("lab-2-master-0", False)]


def test_pods_that_are_gone_are_forgotten_with_their_sftjob() -> None:
    world = World()
    world.put("SFTJob", raw.job())
    world.remove("Pod", raw.ended(1))
    assert world.remove("SFTJob", raw.job()) == LAB
    assert world.job_keys() == set()


def test_a_list_takes_away_what_it_does_not_have() -> None:
    world = World()
    world.put("SFTJob", at(5, raw.job()))
    world.put("PyTorchJob", at(6, raw.gang()))
    world.put("Pod", at(7, raw.running()))
    for kind in ("SFTJob", "PyTorchJob", "Pod"):
        world.prune(kind, None, set(), as_of=7)
    assert world.job_keys() == set()


def test_a_list_leaves_what_it_has_what_is_newer_and_what_it_does_not_speak_of() -> None:
    world = World()
    world.put("Pod", at(5, raw.running()))
    world.put("Pod", at(8, raw.running(rank=1)))
    world.put("PyTorchJob", at(5, raw.gang()))
    world.prune("Pod", None, {"uid-of-lab-1-master-0"}, as_of=7)
    world.prune("Pod", "another-namespace", set(), as_of=9)
    assert names(world) == [("lab-1-master-0", False), ("lab-1-worker-0", False)]
    assert len(world.observed(LAB).gangs) == 1


def test_a_list_leaves_pods_that_are_known_to_be_gone() -> None:
    world = World()
    world.remove("Pod", at(5, raw.ended(1)))
    world.prune("Pod", None, set(), as_of=9)
    assert names(world) == [("lab-1-master-0", True)]


def test_what_the_api_server_denies_is_forgotten() -> None:
    world = World()
    world.put("SFTJob", raw.job())
    world.put("PyTorchJob", raw.gang())
    world.put("PodGroup", raw.pod_group())
    world.forget(LAB, "PodGroup", "lab-1")
    assert isinstance(world.find(LAB, "PyTorchJob", "lab-1").projection, Gang)  # type: ignore[union-attr]
    assert world.find(LAB, "PodGroup", "lab-1") is None
    world.forget_job(LAB)
    assert world.job(LAB) is None


def test_an_object_that_is_not_ours_changes_nothing() -> None:
    world = World()
    given = raw.pod()
    given["metadata"]["labels"] = {"app": "web"}
    assert world.put("Pod", given) is None
    assert world.remove("Pod", given) is None
    assert world.job_keys() == set()


def test_what_is_remembered_of_deleted_objects_is_bounded() -> None:
    world = World()
    for number in range(DELETED_KEPT + 10):
        given = raw.gang(uid=f"uid-{number}")
        world.remove("PyTorchJob", given)
    assert len(world._deleted) == DELETED_KEPT


def test_managed_fields_are_not_kept() -> None:
    world = World()
    world.put("SFTJob", raw.job(managedFields=[{"manager": "kubectl"}]))
    assert "managedFields" not in world.job(LAB)["metadata"]  # type: ignore[index]
