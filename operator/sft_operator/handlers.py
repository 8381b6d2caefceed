"""The only module that imports kopf: it stores what the watches tell, and enqueues the SFTJob that it concerns.

Nothing is decided here, so kopf has nothing to remember and writes nothing on any object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sft_api import labels
from sft_operator.cluster import RESOURCES
from sft_operator.official_client import without_synchronous_half
from sft_operator.settings import Settings
from sft_operator.views import Key
from sft_operator.world import World

with without_synchronous_half():
    import kopf

CHILDREN = ("PyTorchJob", "Job", "Pod")
WATCHED = ("SFTJob", *CHILDREN)


async def watch(world: World, settings: Settings, enqueue: Callable[[Key], None], relisted: Callable[[], None]) -> None:
    """Watch until the process is told to end, or nothing can be watched any more: then this raises."""
    await kopf.operator(
        registry=registry(world, enqueue, relisted),
        settings=operator_settings(),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
    )


def registry(world: World, enqueue: Callable[[Key], None], relisted: Callable[[], None]) -> kopf.OperatorRegistry:
    """One handler for each watched kind."""
    handlers = kopf.OperatorRegistry()
    kopf.on.login(registry=handlers)(log_in)
    for kind in WATCHED:
        group, _, api_version = RESOURCES[kind].group_version.rpartition("/")
        handler = storing(kind, world, enqueue, relisted)
        kopf.on.event(group, api_version, RESOURCES[kind].plural, id=f"store-{kind}", registry=handlers)(handler)
    return handlers


def storing(
    kind: str, world: World, enqueue: Callable[[Key], None], relisted: Callable[[], None]
) -> Callable[..., Any]:
    """What is done with an event about an object of this kind."""

    async def store(event: Mapping[str, Any], **_: Any) -> None:
        if event["type"] is None:
            relisted()
        change = world.remove if event["type"] == "DELETED" else world.put
        if (key := change(kind, event["object"])) is not None:
            enqueue(key)

    return store


async def log_in(**arguments: Any) -> kopf.ConnectionInfo | None:
    """By the pod's service account, else by a kubeconfig: as our own calls do."""
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)


def operator_settings() -> kopf.OperatorSettings:
    chosen = kopf.OperatorSettings()
    chosen.scanning.disabled = True  # it would want to list CRDs and namespaces
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    chosen.watching.server_timeout = 240
    chosen.watching.client_timeout = 270
    chosen.watching.connect_timeout = 10
    chosen.watching.reconnect_backoff = 1
    chosen.watching.chunk_size = 100  # a page of raw objects is held in memory as a whole
    chosen.queueing.idle_timeout = 0.5  # and so is a task for each object seen, for this long
    chosen.networking.request_timeout = 30
    chosen.networking.connect_timeout = 10
    chosen.networking.enforce_retry_after = True
    for kind in CHILDREN:
        resource = RESOURCES[kind]
        chosen.watching.label_selectors[resource.group_version, resource.plural] = labels.JOB
    return chosen
