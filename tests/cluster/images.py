"""The images that nodes start with, written in plain Python: there is no registry to pull from.

localhost/pause:1                what holds a pod's namespaces
localhost/busybox:1              a shell and its tools, for tests and for the training operator's init container
localhost/training-operator:1    busybox and the training operator's static binary
localhost/sft-trainer:test       busybox, and the trainer of this checkout as its entry point (see hostpy)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

PAUSE = "localhost/pause:1"
BUSYBOX = "localhost/busybox:1"
TRAINING_OPERATOR = "localhost/training-operator:1"
TRAINER = "localhost/sft-trainer:test"
TRAINER_USER = 10001
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
"""The store's client does not start without any, not even for http."""

ROOT = Path(__file__).parents[2]

# Busybox's own nslookup fails for every name that is not found below each search suffix, that is for all short ones.
NSLOOKUP = """\
#!/bin/sh
name=$1
case $name in
*.) ;;
*.svc.cluster.local) name=$name. ;;
*) name=$name.$(busybox awk '/^search/ { print $2 }' /etc/resolv.conf). ;;
esac
exec /bin/busybox nslookup -type=a "$name"
"""


@dataclass(frozen=True)
class Image:
    """A name, its layers from the bottom, and the `config` part of its configuration."""

    name: str
    layers: tuple[bytes, ...]
    config: dict[str, object] = field(default_factory=dict)


def write_images(training_operator: Path, archive: Path) -> None:
    """All images in one docker-archive; layers that they share are in it once."""
    busybox = busybox_layer()
    environment = ["PATH=/bin:/usr/bin"]
    sleep = ["/bin/busybox", "sleep", "2147483647"]
    virtual_environment = Path(sys.prefix)
    trainer: dict[str, object] = {
        "Entrypoint": [str(virtual_environment / "bin" / "python"), "-m", "sft_trainer"],
        "Env": [f"PATH={virtual_environment / 'bin'}:/bin:/usr/bin", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1"],
        "User": f"{TRAINER_USER}:{TRAINER_USER}",
    }
    images = [
        Image(PAUSE, (busybox,), {"Entrypoint": sleep, "Env": environment}),
        Image(BUSYBOX, (busybox,), {"Cmd": ["sh"], "Env": environment}),
        Image(TRAINING_OPERATOR, (busybox, layer({"manager": training_operator.read_bytes()})), {"Env": environment}),
        Image(TRAINER, (busybox, layer({"etc/ssl/certs/ca-certificates.crt": AUTHORITIES.read_bytes()})), trainer),
    ]
    write_archive(images, archive)


def busybox_layer() -> bytes:
    """Busybox with bash for a shell: busybox's shell would take its own applets before any file in /bin."""
    busybox = Path("/bin/busybox")
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    files = {
        "bin/busybox": busybox.read_bytes(),
        "bin/sh": Path("/bin/bash-static").read_bytes(),
        "bin/nslookup": NSLOOKUP.encode(),
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
        "etc/group": b"root:x:0:\n",
    }
    links = {f"bin/{applet}": "/bin/busybox" for applet in applets if f"bin/{applet}" not in files}
    return layer(files, links)


def layer(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """A layer's tar, the same for the same content. Every file can be executed; /tmp is everybody's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for folder, mode in (("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777)):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return buffer.getvalue()


def write_archive(images: list[Image], path: Path) -> None:
    """A docker-archive, which containerd imports with the names as they are."""
    members: dict[str, bytes] = {}
    manifest = []
    for image in images:
        digests = [hashlib.sha256(content).hexdigest() for content in image.layers]
        configuration = json.dumps(
            {
                "architecture": _architecture(),
                "os": "linux",
                "config": image.config,
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
            }
        ).encode()
        name = f"{hashlib.sha256(configuration).hexdigest()}.json"
        members[name] = configuration
        members.update({f"{digest}.tar": content for digest, content in zip(digests, image.layers, strict=True)})
        layers = [f"{digest}.tar" for digest in digests]
        manifest.append({"Config": name, "RepoTags": [image.name], "Layers": layers})
    members["manifest.json"] = json.dumps(manifest).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
