"""A node: real kubelet, containerd and kube-proxy in namespaces of their own. It starts, dies, and comes back."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from threading import Event

import yaml

from tests.cluster.hostpy import HANDLER, SPEC
from tests.cluster.images import PAUSE
from tests.cluster.layout import Layout, NodeLayout
from tests.cluster.processes import Processes

INIT = Path(__file__).parent / "node.sh"
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_SECONDS = 20.0

# Version 2 of the format, for containerd 1.6. The default runtime is plain: a real image runs its own files.
CONTAINERD = """\
version = 2
root = "{state}/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{state}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}]
      runtime_type = "io.containerd.runc.v2"
      base_runtime_spec = "{spec}"
"""


class Node:
    """One node of the cluster."""

    def __init__(self, layout: Layout, place: NodeLayout, processes: Processes) -> None:
        self.name = place.name
        self._layout = layout
        self._place = place
        self._processes = processes

    def configure(self) -> None:
        """Write what its programs read."""
        state = self._place.state
        (state / "cni").mkdir()
        (state / "resolv.conf").touch()
        spec = self._layout.state / SPEC
        (state / "containerd.toml").write_text(CONTAINERD.format(state=state, pause=PAUSE, handler=HANDLER, spec=spec))
        (state / "cni" / "10-bridge.conflist").write_text(json.dumps(self._cni()))
        (state / "kubelet.yaml").write_text(yaml.safe_dump(self._kubelet(), sort_keys=False))

    def start(self) -> None:
        """Switch it on. Its files are those of the last time, as on a machine that boots again."""
        enter = ["nsenter", f"--net={self._place.network_namespace}"]
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc"]
        environment = {
            "NODE": self.name,
            "ADDRESS": self._place.address,
            "STATE": str(self._place.state),
            "BIN": str(self._layout.bin),
            "IMAGES": str(self._layout.state / "images"),
            "CGROUP": self._place.on_machine,
            "CONTROLLERS": " ".join(path.name for path in controllers()),
            "POD_NETWORK": self._layout.pods,
            "KUBELET_KUBECONFIG": str(self._layout.kubeconfig_of(self.name)),
            "PROXY_KUBECONFIG": str(self._layout.kubeconfig_of("kube-proxy")),
        }
        self._processes.start(self.name, [*enter, *unshare, INIT], environment)

    def kill(self) -> None:
        """The power goes: kubelet, containerd and every container at once."""
        self._processes.kill([self.name])
        remove_cgroups(self._place)

    def import_image(self, tar: Path) -> None:
        """Put a docker-archive's images where containerd has its own; their names stay."""
        pid = self._processes.pid(self.name)
        assert pid, f"{self.name} is not running"
        inside = ["nsenter", f"--target={pid}", "--mount"]
        command = [*inside, "ctr", "--namespace", "k8s.io", "images", "import", str(tar)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{self.name} does not take {tar}: {done.stderr}"

    def _cni(self) -> dict[str, object]:
        ipam = {
            "type": "host-local",
            "dataDir": "/var/lib/cni",
            "ranges": [[{"subnet": self._place.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True}
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [{**bridge, "ipam": ipam}, ports]}

    def _kubelet(self) -> dict[str, object]:
        pki = self._layout.pki
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._place.on_machine}",
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "podLogsDir": "/var/log/pods",
            "resolvConf": str(self._place.state / "resolv.conf"),
            "clusterDNS": [self._layout.host],
            "clusterDomain": "cluster.local",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki / f"{self.name}.crt"),
            "tlsPrivateKeyFile": str(pki / f"{self.name}.key"),
            "address": self._place.address,
            "healthzBindAddress": "127.0.0.1",
            # Seconds, so that a lost node is noticed in seconds.
            "nodeStatusUpdateFrequency": "2s",
            "nodeStatusReportFrequency": "10s",
            "nodeLeaseDurationSeconds": 4,
            # All nodes share the disk and the memory of this machine: none may evict for what others use.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageMinimumGCAge": "24h",
            "imageGCHighThresholdPercent": 100,  # never: nothing can be pulled again
            "imagePullCredentialsVerificationPolicy": "NeverVerify",
            "failSwapOn": False,
            "maxPods": 60,
        }


def controllers() -> list[Path]:
    """The machine's cgroup v1 hierarchies."""
    return [path for path in hierarchies() if (path / "cgroup.clone_children").exists()]


def hierarchies() -> list[Path]:
    """All of them: version 2 is often mounted beside, and kubelet makes its groups there, too."""
    return [path for path in sorted(CGROUPS.glob("*")) if (path / "cgroup.procs").exists()]


def remove_cgroups(place: NodeLayout) -> None:
    """Remove a dead node's cgroups, as soon as the kernel has seen the last process off."""
    deadline = time.monotonic() + CGROUP_SECONDS
    for hierarchy in hierarchies():
        root = hierarchy / place.on_machine
        while not _removed(root):
            assert time.monotonic() < deadline, f"{root} still has processes"
            Event().wait(0.02)


def _removed(cgroup: Path) -> bool:
    if not cgroup.exists():
        return True
    try:
        for path in sorted((path for path in cgroup.rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
        cgroup.rmdir()
    except OSError:
        return False
    return True
