"""The cluster's certificates and kubeconfigs: one authority for everything, made anew for each cluster."""

from __future__ import annotations

import datetime
import ipaddress
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.cluster.layout import Layout

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
VALIDITY = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: PrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        # PKCS#1 and SEC 1: what Go's older certificate tools read.
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())

    def write(self, folder: Path, name: str) -> None:
        (folder / f"{name}.crt").write_bytes(self.pem)
        (folder / f"{name}.key").write_bytes(self.key_pem)
        (folder / f"{name}.key").chmod(0o600)


def authority(common_name: str, organization: str, key: PrivateKey) -> Certificate:
    """A certificate authority, signed by itself."""
    name = _name(common_name, organization)
    builder = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Certificate(builder.sign(key, hashes.SHA256()), key)


def issue(
    ca: Certificate, common_name: str, organization: str = "", hosts: Sequence[str] = (), key: PrivateKey | None = None
) -> Certificate:
    """A certificate for a client, and for a server where it names `hosts`."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(common_name, organization), ca.certificate.subject, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    # Strict clients (Python 3.13) want to see who signed.
    authority_key = ca.key.public_key()
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key), critical=False)
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return Certificate(builder.sign(ca.key, hashes.SHA256()), key)


def _name(common_name: str, organization: str) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _builder(subject: x509.Name, issuer: x509.Name, key: PrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + VALIDITY)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def write_pki(layout: Layout) -> None:
    """All keys, certificates and kubeconfigs of a cluster, below its state folder."""
    layout.pki.mkdir(parents=True)
    ca = authority("sftjob-test", "", ec.generate_private_key(ec.SECP256R1()))
    ca.write(layout.pki, "ca")
    _write_servers(layout, ca)
    _write_service_account_key(layout)
    kubeconfig = _Kubeconfigs(layout, ca)
    kubeconfig.write(layout.kubeconfig, "admin", "system:masters")
    for user in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
        kubeconfig.write(layout.kubeconfig_of(user), f"system:{user}")
    kubeconfig.write(layout.kubeconfig_of("coredns"), "coredns")
    for node in layout.nodes:
        hosts = [node.name, node.address]
        kubeconfig.write(layout.kubeconfig_of(node.name), f"system:node:{node.name}", "system:nodes", hosts)


def _write_servers(layout: Layout, ca: Certificate) -> None:
    kubernetes = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    hosts = [*kubernetes, "localhost", layout.host, layout.loopback, layout.api_service]
    issue(ca, "kube-apiserver", hosts=hosts).write(layout.pki, "apiserver")
    issue(ca, "etcd", hosts=[layout.loopback]).write(layout.pki, "etcd")
    issue(ca, "apiserver-etcd").write(layout.pki, "apiserver-etcd")
    issue(ca, "kube-apiserver-kubelet-client", "system:masters").write(layout.pki, "apiserver-kubelet")
    issue(ca, "front-proxy-client").write(layout.pki, "front-proxy-client")


def _write_service_account_key(layout: Layout) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (layout.pki / "sa.key").write_bytes(private)
    (layout.pki / "sa.key").chmod(0o600)
    (layout.pki / "sa.pub").write_bytes(public)


@dataclass(frozen=True)
class _Kubeconfigs:
    layout: Layout
    ca: Certificate

    def write(self, path: Path, user: str, group: str = "", hosts: Sequence[str] = ()) -> None:
        """A kubeconfig that stands alone, and the same certificate as files beside the others."""
        certificate = issue(self.ca, user, group, hosts)
        certificate.write(self.layout.pki, path.name if path != self.layout.kubeconfig else "admin")
        cluster = {"server": self.layout.api_server, "certificate-authority-data": _base64(self.ca.pem)}
        credentials = {
            "client-certificate-data": _base64(certificate.pem),
            "client-key-data": _base64(certificate.key_pem),
        }
        name = self.layout.name
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": user}}],
            "current-context": name,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        path.chmod(0o600)


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
