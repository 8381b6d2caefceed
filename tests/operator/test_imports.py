"""What the operator's process has in memory: nothing of what only users, trainers or generated code need."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import sft_operator.__main__
import kubernetes.aio.client, kubernetes.aio.config
kubernetes.aio.client.ApiClient, kubernetes.aio.config.load_kube_config
print("\\n".join(sorted(sys.modules)))
"""
"""All that the process loads, and what it loads of the official client when it connects."""


def loaded() -> set[str]:
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_operator_loads_no_generated_class_no_synchronous_client_and_nothing_of_the_trainer() -> None:
    modules = loaded()
    assert {"kopf", "kubernetes.aio.client.api_client", "sft_operator.handlers"} <= modules
    unwanted = ("torch", "numpy", "sft_trainer", "sft_cli", "kubernetes.client", "kubernetes.config", "rich")
    generated = ("kubernetes.aio.client.models.", "kubernetes.aio.client.api.")
    assert [name for name in modules if name in unwanted or name.startswith(generated)] == []
