"""etcd, API server, controller manager, scheduler and DNS: processes of this machine, beside the nodes.

DNS is here and not in a pod, so that it needs no image and outlives every node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.cluster.layout import Layout
from tests.cluster.processes import Processes

GANG_SCHEDULING = "--feature-gates=GenericWorkload=true"
"""Native gang scheduling: off by default in 1.37, and its API group as well."""

DNS = """\
cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {{
    bind {host}
    errors
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 0
    }}
}}
# Without this, other names would be refused, and clients would take that for a passing fault and try again.
.:53 {{
    bind {host}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""

DNS_ACCESS: list[dict[str, Any]] = [
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "coredns"},
        "rules": [
            {
                "apiGroups": [""],
                "resources": ["endpoints", "services", "pods", "namespaces"],
                "verbs": ["list", "watch"],
            },
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        ],
    },
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "coredns"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "coredns"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "coredns"}],
    },
]


def start_api(layout: Layout, processes: Processes) -> None:
    """etcd and the API server, which waits for it."""
    processes.start("etcd", [layout.bin / "etcd", *_etcd(layout)])
    processes.start("kube-apiserver", [layout.bin / "kube-apiserver", *_api_server(layout)])


def start_controllers(layout: Layout, processes: Processes) -> None:
    """What needs an API server that answers."""
    processes.start("kube-controller-manager", [layout.bin / "kube-controller-manager", *_controller_manager(layout)])
    processes.start("kube-scheduler", [layout.bin / "kube-scheduler", *_scheduler(layout)])
    corefile = layout.state / "Corefile"
    corefile.write_text(DNS.format(host=layout.host, kubeconfig=layout.kubeconfig_of("coredns")))
    processes.start("coredns", [layout.bin / "coredns", "-conf", corefile])


def _etcd(layout: Layout) -> list[str]:
    client, peer = f"https://{layout.loopback}:2379", f"http://{layout.loopback}:2380"
    return [
        "--name=test",
        f"--data-dir={layout.state / 'etcd'}",
        "--unsafe-no-fsync",  # a test's cluster need not outlive the machine
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=test={peer}",
        "--client-cert-auth",
        f"--trusted-ca-file={layout.pki / 'ca.crt'}",
        f"--cert-file={layout.pki / 'etcd.crt'}",
        f"--key-file={layout.pki / 'etcd.key'}",
        "--log-level=warn",
    ]


def _api_server(layout: Layout) -> list[str]:
    pki = layout.pki
    return [
        f"--etcd-servers=https://{layout.loopback}:2379",
        f"--etcd-cafile={pki / 'ca.crt'}",
        *_pair("etcd-certfile", "etcd-keyfile", pki / "apiserver-etcd"),
        f"--bind-address={layout.host}",
        f"--advertise-address={layout.host}",
        "--secure-port=6443",
        *_pair("tls-cert-file", "tls-private-key-file", pki / "apiserver"),
        f"--client-ca-file={pki / 'ca.crt'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        *_pair("kubelet-client-certificate", "kubelet-client-key", pki / "apiserver-kubelet"),
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki / 'sa.pub'}",
        f"--service-account-signing-key-file={pki / 'sa.key'}",
        f"--service-cluster-ip-range={layout.services}",
        "--enable-aggregator-routing=true",  # webhooks are called at their pods: no service routing out here
        f"--requestheader-client-ca-file={pki / 'ca.crt'}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        *_pair("proxy-client-cert-file", "proxy-client-key-file", pki / "front-proxy-client"),
        "--runtime-config=scheduling.k8s.io/v1beta1=true",
        GANG_SCHEDULING,
        # A lost node's pods are evicted in seconds, not in five minutes.
        "--default-not-ready-toleration-seconds=5",
        "--default-unreachable-toleration-seconds=5",
        "--profiling=false",
    ]


def _controller_manager(layout: Layout) -> list[str]:
    return [
        *_as_user(layout, "kube-controller-manager"),
        f"--kubeconfig={layout.kubeconfig_of('kube-controller-manager')}",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={layout.pki / 'sa.key'}",
        f"--root-ca-file={layout.pki / 'ca.crt'}",
        *_pair("cluster-signing-cert-file", "cluster-signing-key-file", layout.pki / "ca"),
        "--allocate-node-cidrs=false",  # the nodes' CNI configuration says which pods' addresses are whose
        f"--cluster-cidr={layout.pods}",
        f"--service-cluster-ip-range={layout.services}",
        "--node-monitor-period=1s",
        "--node-monitor-grace-period=8s",
        GANG_SCHEDULING,
    ]


def _scheduler(layout: Layout) -> list[str]:
    configuration = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "clientConnection": {"kubeconfig": str(layout.kubeconfig_of("kube-scheduler"))},
        "leaderElection": {"leaderElect": False},
        "podInitialBackoffSeconds": 1,
        "podMaxBackoffSeconds": 1,
    }
    path = layout.state / "scheduler.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return [f"--config={path}", *_as_user(layout, "kube-scheduler"), GANG_SCHEDULING]


def _as_user(layout: Layout, user: str) -> list[str]:
    kubeconfig = layout.kubeconfig_of(user)
    return [
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        f"--bind-address={layout.loopback}",
    ]


def _pair(certificate_flag: str, key_flag: str, path: Path) -> list[str]:
    return [f"--{certificate_flag}={path}.crt", f"--{key_flag}={path}.key"]
