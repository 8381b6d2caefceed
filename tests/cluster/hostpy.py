"""The container runtime `hostpy`: pods run this checkout's Python, mounted from the machine; no image holds it.

An image of the trainer's environment would be 5 GB on each node. Instead the runtime's base specification mounts the
machine's libraries, the Python installation, the virtual environment and the checkout, all read-only. The pod's
manifest shows none of it and passes the restricted Pod Security Standard. Pods of a namespace with the label
`hostpy: "true"` get this runtime by an admission policy, so that the product's manifests are what users get.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.images import ROOT

HANDLER = "hostpy"
LABEL = {HANDLER: "true"}
SPEC = "hostpy.json"
"""Below the cluster's state folder. containerd reads it once, at its start."""


def write_spec(state: Path) -> None:
    """The runtime's base specification: containerd's own and our mounts."""
    done = subprocess.run(["ctr", "oci", "spec"], check=True, capture_output=True, text=True)
    spec = json.loads(done.stdout)
    spec["mounts"] += [_mount(source, destination) for destination, source in _mounts().items()]
    (state / SPEC).write_text(json.dumps(spec))


def _mounts() -> dict[Path, Path]:
    """Destination → source. What lies below another source is there with it."""
    libraries = {Path("/usr"): Path("/usr")} | {
        Path(path): Path(path).resolve() for path in ("/lib", "/lib64") if Path(path).exists()
    }
    for path in (Path(sys.base_prefix), ROOT, Path(sys.prefix)):
        if not any(path.is_relative_to(mounted) for mounted in libraries):
            libraries[path] = path
    return libraries


def _mount(source: Path, destination: Path) -> dict[str, Any]:
    # Not "rbind": what a running cluster has mounted below the checkout is none of the pods' business.
    options = ["bind", "ro", "nosuid", "nodev"]
    return {"destination": str(destination), "type": "bind", "source": str(source), "options": options}


def manifests() -> list[dict[str, Any]]:
    """The RuntimeClass, and the policy that gives it to the pods of labelled namespaces."""
    policy = {
        "matchConstraints": {
            "namespaceSelector": {"matchLabels": LABEL},
            "resourceRules": [
                {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
            ],
        },
        "failurePolicy": "Fail",
        "reinvocationPolicy": "Never",
        "mutations": [
            {
                "patchType": "ApplyConfiguration",
                "applyConfiguration": {"expression": f'Object{{spec: Object.spec{{runtimeClassName: "{HANDLER}"}}}}'},
            }
        ],
    }
    admission = "admissionregistration.k8s.io/v1"
    name = {"name": HANDLER}
    return [
        {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": name, "handler": HANDLER},
        {"apiVersion": admission, "kind": "MutatingAdmissionPolicy", "metadata": name, "spec": policy},
        {
            "apiVersion": admission,
            "kind": "MutatingAdmissionPolicyBinding",
            "metadata": name,
            "spec": {"policyName": HANDLER},
        },
    ]
