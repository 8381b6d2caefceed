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

DOCUMENTED = Path(__file__).parents[2] / "docs/training-operator/config.yaml"
"""What users are told to apply. Without it every worker pod is refused in a restricted namespace."""


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
    manifest: Manifest = yaml.safe_load(DOCUMENTED.read_text())
    assert (manifest["metadata"]["name"], manifest["metadata"]["namespace"]) == (CONFIGURATION, NAMESPACE)
    return manifest


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
