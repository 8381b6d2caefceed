#!/usr/bin/env bash
# Process 1 of a node: kubelet, containerd and kube-proxy in a PID and a mount namespace of their own, so that one
# kill -9 of it takes everything of the node along. Started by node.py, which sets the variables in capitals.
set -euo pipefail

mount --make-rprivate /
hostname "$NODE"

# These paths are fixed in kubelet and containerd. /run is empty after each start, as after a boot; the rest stays.
for path in /var/lib/kubelet /var/log/pods /var/log/containers /var/lib/cni; do
  mkdir -p "$path" "$STATE$path"
  mount --bind "$STATE$path" "$path"
done
mkdir -p /run/containerd
mount -t tmpfs tmpfs /run/containerd
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns # the pods' network namespaces would else be names outside
mount --make-rshared /

for controller in $CONTROLLERS; do mkdir -p "/sys/fs/cgroup/$controller/$CGROUP"; done
for file in cpuset.cpus cpuset.mems; do cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$CGROUP/$file"; done

containerd --config "$STATE/containerd.toml" &
until ctr version >/dev/null 2>&1; do sleep 0.05; done
if [ ! -e "$STATE/images-imported" ]; then
  for image in "$IMAGES"/*.tar; do ctr --namespace k8s.io images import "$image"; done
  touch "$STATE/images-imported"
fi

"$BIN/kubelet" --config="$STATE/kubelet.yaml" --kubeconfig="$KUBELET_KUBECONFIG" --hostname-override="$NODE" \
  --node-ip="$ADDRESS" --root-dir=/var/lib/kubelet &
"$BIN/kube-proxy" --kubeconfig="$PROXY_KUBECONFIG" --proxy-mode=nftables --cluster-cidr="$POD_NETWORK" \
  --hostname-override="$NODE" --healthz-bind-address=127.0.0.1:10256 --metrics-bind-address=127.0.0.1:10249 \
  --conntrack-max-per-core=0 &

# What containers leave behind becomes a child of process 1, which has to take note of its end.
while :; do wait -n || sleep 0.2; done
