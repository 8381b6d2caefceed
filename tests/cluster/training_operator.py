"""Kubeflow's training operator v1, in the cluster with its webhook, from the manifests that build_tools.sh rendered."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.cluster.client import Client, Manifest
from tests.cluster.pki import Certificate, authority, issue

NAMESPACE = "kubeflow"
NAME = "training-operator"
CONFIGURATION = "training-operator-config"

INIT_CONTAINER = """\
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  securityContext:
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
  resources:
    requests: {cpu: 50m, memory: 10Mi}
    limits: {cpu: 500m, memory: 20Mi}
  command:
  - sh
  - -c
  - |
    for i in $(seq {{.MaxTries}}); do
      nslookup {{.MasterAddr}} && exit 0
      echo waiting for master; sleep 2
    done
    exit 1
"""
"""The init container of workers as a restricted namespace takes it. Its own has no security context, and every worker
pod is refused."""


def manifests(rendered: Path, *, restricted: bool = True) -> list[Manifest]:
    """Everything of it, in the order in which it can be created."""
    every: list[Manifest] = [
        manifest for manifest in yaml.load_all(rendered.read_text(), Loader=yaml.CSafeLoader) if manifest
    ]
    for manifest in every:
        if manifest["kind"] == "Secret":
            # With an empty one it makes its certificates itself, and a kubelet takes two minutes to show it its own.
            manifest["data"] = _webhook_certificates()
    return [*every, *([configuration()] if restricted else [])]


def configuration() -> Manifest:
    """The ConfigMap that lets workers start in a restricted namespace. Optional to the Deployment, as for users."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIGURATION, "namespace": NAMESPACE},
        "data": {"initContainer.yaml": INIT_CONTAINER},
    }


def is_available(client: Client) -> bool:
    """Whether its one pod, of the newest template, is ready, and so its webhook."""
    deployment: dict[str, Any] = client.get("Deployment", NAME, NAMESPACE) or {}
    status = deployment.get("status", {})
    observed = status.get("observedGeneration", 0) >= deployment.get("metadata", {}).get("generation", 1)
    num_pods = [status.get(kind, 0) for kind in ("replicas", "updatedReplicas", "availableReplicas")]
    return bool(observed) and num_pods == [1, 1, 1]


def restart(client: Client, reason: str) -> None:
    """A new pod: it reads its init container once. The old one goes first, or it might still be asked."""
    annotations = {"metadata": {"annotations": {"restarted-for": reason}}}
    patch = {"spec": {"strategy": {"type": "Recreate", "rollingUpdate": None}, "template": annotations}}
    client.patch("Deployment", NAME, patch, NAMESPACE)


def _webhook_certificates() -> dict[str, str]:
    """As its certificate controller would have made them: it finds them good and injects the authority itself."""
    ca = authority("training-operator-ca", "training-operator", _rsa_key())
    server = issue(ca, NAME, hosts=[f"{NAME}.{NAMESPACE}.svc"], key=_rsa_key())
    return {**_secret_keys("ca", ca), **_secret_keys("tls", server)}


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _secret_keys(prefix: str, certificate: Certificate) -> dict[str, str]:
    pem = {f"{prefix}.crt": certificate.pem, f"{prefix}.key": certificate.key_pem}
    return {key: b64encode(value).decode() for key, value in pem.items()}
