"""The official Kubernetes client, as little of it as the operator uses: kubernetes.aio's ApiClient and configuration.

Its package imports the synchronous half and, once touched, hundreds of generated classes: 100 MiB that only examples
need. Here the package is entered without running its __init__, and kopf, which would import the synchronous half only
to see whether it is there, is told that it is not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

PACKAGE = "kubernetes"
CONNECTIONS = 16


def _enter_package() -> None:
    if PACKAGE in sys.modules:
        return
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.submodule_search_locations is not None
    package = ModuleType(PACKAGE)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[PACKAGE] = package


@contextmanager
def without_synchronous_half() -> Iterator[None]:
    """While this lasts, importing kubernetes.client fails as if it were not installed."""
    name = f"{PACKAGE}.client"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


async def api_client(kubeconfig: str | None = None) -> Any:
    """An ApiClient: by the pod's service account, else by a kubeconfig, as kubectl finds it where none is named."""
    client: Any = importlib.import_module("kubernetes.aio.client")
    config: Any = importlib.import_module("kubernetes.aio.config")
    configuration = client.Configuration()
    if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(kubeconfig, client_configuration=configuration)
    configuration.connection_pool_maxsize = CONNECTIONS
    api = client.ApiClient(configuration)
    api.user_agent = "sft-operator"
    return api


_enter_package()
