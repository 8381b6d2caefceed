"""The rules across the fields that say what pods are to be like and how they get onto nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sft_api.pods import QUALIFIED_NAME_PATTERN, Credentials, EnvSource, EnvVar, Resources, Scheduling, Toleration
from sft_api.rule import Given, Rule, Wrongs, elements, exactly_one, mapping, section
from sft_api.spec import Trainer
from sft_api.wording import listing, shown

CONTAINER = "pytorch"
"""The training operator asks for this name."""
OUR_PREFIXES = ("SFT_", "PET_")
OUR_NAMES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""Environment variables by which the ranks of a gang find each other."""
OURS = f"names that begin with {listing(OUR_PREFIXES, 'or')} are ours, and so are {listing(OUR_NAMES)}"
OUR_LABELS = ("sftjob.dev/", "training.kubeflow.org/", "app.kubernetes.io/managed-by")
QUEUED = ("Volcano", "Kueue", "KAI")
"""The gang schedulers that have queues."""
PLAIN_RESOURCES = ("cpu", "memory", "ephemeral-storage")
RESOURCE_NAMES = "cpu, memory, ephemeral-storage, hugepages-SIZE or DOMAIN/NAME"
GPU_SUFFIX = "/gpu"
FIXED = {
    "restartPolicy": "a gang is restarted whole, by the operator; spec.lifecycle says how often",
    "schedulingGroup": "spec.scheduling.gang says who places the pods together",
    "hostname": "the pods of a gang find each other by the names they are given",
    "subdomain": "the pods of a gang find each other by the names they are given",
}
"""Fields of a pod that no override may change, and why."""
FIXED_IN_CONTAINER = {
    "command": "what the container runs is ours",
    "args": "what the container runs is ours",
    "image": "spec.trainer.image says it",
}


def env_name_is_free(given: Given) -> Wrongs:
    name = given.get("name")
    if isinstance(name, str) and (name in OUR_NAMES or name.startswith(OUR_PREFIXES)):
        yield "name", f"{name} cannot be set: {OURS}"


def env_names_are_unique(given: Given) -> Wrongs:
    seen: dict[str, int] = {}
    for index, variable in enumerate(elements(given, "env")):
        name = mapping(variable).get("name")
        if isinstance(name, str) and seen.setdefault(name, index) != index:
            yield f"env[{index}].name", f"{name} is already the name of env[{seen[name]}]; give each name once"


def existence_has_no_value(given: Given) -> Wrongs:
    if given.get("operator") == "Exists" and "value" in given:
        yield "value", "is allowed only with operator Equal; Exists takes every value"


def equality_has_a_key(given: Given) -> Wrongs:
    if given.get("operator", "Equal") == "Equal" and "key" not in given:
        yield "key", "is required with operator Equal; without it, operator: Exists puts up with every taint"


def seconds_are_of_no_execute(given: Given) -> Wrongs:
    if "tolerationSeconds" in given and given.get("effect") != "NoExecute":
        yield "tolerationSeconds", "is allowed only with effect NoExecute, the one that makes pods leave"


def amounts(given: Given) -> Iterator[tuple[str, str]]:
    """The path and the name of every resource."""
    for kind in ("requests", "limits"):
        yield from ((f"{kind}.{name}", name) for name in section(given, kind))


def resources_are_known(given: Given) -> Wrongs:
    for path, name in amounts(given):
        if not (name in PLAIN_RESOURCES or name.startswith("hugepages-") or "/" in name):
            yield path, f"is no resource; allowed: {RESOURCE_NAMES}"


def gpus_are_counted_once(given: Given) -> Wrongs:
    for path, name in amounts(given):
        if name.endswith(GPU_SUFFIX):
            yield path, "cannot be set: spec.trainer.gpusPerNode says it"


def kueue_has_a_queue(given: Given) -> Wrongs:
    if given.get("gang") == "Kueue" and "queue" not in given:
        yield "queue", "is required with gang Kueue: the name of a LocalQueue in the job's namespace"


def queue_is_of_a_scheduler_that_has_queues(given: Given) -> Wrongs:
    gang = given.get("gang", "Auto")
    if "queue" in given and isinstance(gang, str) and gang not in QUEUED:
        default = "" if "gang" in given else " (the default)"
        yield "queue", f"cannot be obeyed with gang {gang}{default}; allowed with {listing(QUEUED, 'or')}"


def node_labels_are_labels(given: Given) -> Wrongs:
    for name in section(given, "nodeSelector"):
        if len(name) > 317 or not re.search(QUALIFIED_NAME_PATTERN, name):
            yield f"nodeSelector.{name}", "is no label; allowed: NAME or DOMAIN/NAME"


def labels_are_not_ours(given: Given) -> Wrongs:
    for name in section(given, "podTemplate", "metadata", "labels"):
        if name.startswith(OUR_LABELS):
            yield f"podTemplate.metadata.labels.{name}", "cannot be set: it is the operator's"


def pods_keep_what_is_relied_on(given: Given) -> Wrongs:
    spec = section(given, "podTemplate", "spec")
    for name, why in FIXED.items():
        if name in spec:
            yield f"podTemplate.spec.{name}", f"cannot be set: {why}"


def containers_have_names(given: Given) -> Wrongs:
    spec = section(given, "podTemplate", "spec")
    for kind in ("containers", "initContainers"):
        yield from elements_have(spec, kind, "name", f"podTemplate.spec.{kind}")


def elements_have(owner: Given, name: str, key: str, path: str) -> Wrongs:
    """Whether `owner[name]`, if there, is a list of mappings that each have `key`: by it they are merged into ours."""
    if name not in owner:
        return
    if not isinstance(owner[name], list):
        yield path, f"{shown(owner[name])} is not allowed; allowed: a list"
        return
    for index, element in enumerate(owner[name]):
        if not isinstance(mapping(element).get(key), str):
            yield f"{path}[{index}].{key}", f"is required and missing: by it the {name} are merged into ours"


def trainer_container_keeps_what_is_relied_on(given: Given) -> Wrongs:
    for path, container in trainer_containers(given):
        for name, why in FIXED_IN_CONTAINER.items():
            if name in container:
                yield f"{path}.{name}", f"cannot be set: {why}"
        yield from elements_have(container, "volumeMounts", "mountPath", f"{path}.volumeMounts")
        yield from elements_have(container, "env", "name", f"{path}.env")
        for index, variable in enumerate(elements(container, "env")):
            for field, message in env_name_is_free(mapping(variable)):
                yield f"{path}.env[{index}].{field}", message


def trainer_containers(given: Given) -> Iterator[tuple[str, Given]]:
    for index, container in enumerate(elements(section(given, "podTemplate", "spec"), "containers")):
        if mapping(container).get("name") == CONTAINER:
            yield f"podTemplate.spec.containers[{index}]", container


def cel_list(words: tuple[str, ...]) -> str:
    return f"[{', '.join(repr(word) for word in words)}]"


def every_resource(condition: str) -> str:
    return f"self.requests.all(k, {condition}) && self.limits.all(k, {condition})"


POD_RULES: list[Rule] = [
    exactly_one(EnvSource, "secretKeyRef", "configMapKeyRef"),
    exactly_one(EnvVar, "value", "valueFrom"),
    Rule(
        EnvVar,
        f"!(self.name in {cel_list(OUR_NAMES)})"
        + "".join(f" && !self.name.startsWith({prefix!r})" for prefix in OUR_PREFIXES),
        OURS,
        env_name_is_free,
    ),
    exactly_one(Credentials, "secretRef", "serviceAccountName"),
    Rule(
        Toleration,
        "self.operator != 'Exists' || !has(self.value)",
        "value is allowed only with operator Equal",
        existence_has_no_value,
    ),
    Rule(
        Toleration,
        "self.operator != 'Equal' || has(self.key)",
        "operator Equal needs a key",
        equality_has_a_key,
    ),
    Rule(
        Toleration,
        "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
        "tolerationSeconds is allowed only with effect NoExecute",
        seconds_are_of_no_execute,
    ),
    Rule(
        Resources,
        every_resource(f"k in {cel_list(PLAIN_RESOURCES)} || k.startsWith('hugepages-') || k.contains('/')"),
        f"a resource is {RESOURCE_NAMES}",
        resources_are_known,
    ),
    Rule(
        Resources,
        every_resource(f"!k.endsWith({GPU_SUFFIX!r})"),
        "gpusPerNode says how many GPUs",
        gpus_are_counted_once,
    ),
    Rule(Scheduling, "self.gang != 'Kueue' || has(self.queue)", "gang Kueue needs a queue", kueue_has_a_queue),
    Rule(
        Scheduling,
        f"!has(self.queue) || self.gang in {cel_list(QUEUED)}",
        f"queue is allowed only with gang {listing(QUEUED, 'or')}",
        queue_is_of_a_scheduler_that_has_queues,
    ),
    Rule(
        Trainer,
        f"self.nodeSelector.all(k, k.size() <= 317 && k.matches('{QUALIFIED_NAME_PATTERN}'))",
        "nodeSelector: a label is NAME or DOMAIN/NAME",
        node_labels_are_labels,
    ),
    Rule(
        Trainer,
        "!has(self.podTemplate.metadata) || !has(self.podTemplate.metadata.labels) || "
        "self.podTemplate.metadata.labels.all(k, "
        + " && ".join(f"!k.startsWith({prefix!r})" for prefix in OUR_LABELS)
        + ")",
        f"podTemplate: labels that begin with {listing(OUR_LABELS, 'or')} are ours",
        labels_are_not_ours,
    ),
    Rule(
        Trainer,
        "self.env.all(p, self.env.exists_one(q, q.name == p.name))",
        "names in env must be unique",
        env_names_are_unique,
    ),
    Rule(
        Trainer,
        None,
        f"podTemplate.spec cannot set {listing(list(FIXED), 'or')}",
        pods_keep_what_is_relied_on,
    ),
    Rule(Trainer, None, "podTemplate.spec: containers and initContainers have names", containers_have_names),
    Rule(
        Trainer,
        None,
        f"podTemplate.spec: the container {CONTAINER} cannot set {listing(list(FIXED_IN_CONTAINER), 'or')}, and no "
        "environment variable that is ours",
        trainer_container_keeps_what_is_relied_on,
    ),
]
