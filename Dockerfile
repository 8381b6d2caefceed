# The operator's image: Debian's Python, what operator/requirements.txt pins, sft_api and sft_operator, and nothing else:
# no shell, no package manager, no pip. `make images` builds it; any of docker, podman and buildah can.
#
# docker build --build-arg VERSION=0.1.0 -t operator .
ARG BASE=docker.io/library/debian:13-slim

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive
# The caches of apt would stay in the layer: its two indices alone have 96 MB.
RUN apt-get update -q \
 && apt-get install -qy --no-install-recommends python3 python3-venv ca-certificates tzdata media-types netbase \
 && apt-get clean && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin

# A proxy's certificates and another index are secrets of the build, not of the image: --secret id=ca, id=pip.
COPY operator/requirements.txt /tmp/requirements.txt
RUN --mount=type=secret,id=ca,target=/run/secrets/ca --mount=type=secret,id=pip,target=/etc/pip.conf \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python3 -m venv --without-pip /opt/venv && python3 -m venv /tmp/pip \
 && /tmp/pip/bin/pip --python /opt/venv/bin/python install --quiet --no-cache-dir --no-compile --disable-pip-version-check \
      --require-hashes --only-binary :all: -r /tmp/requirements.txt

# Of the Kubernetes client the operator uses the connection and the configuration (kubernetes.aio: ApiClient, config) and
# no generated class, by a rule of its design. The generated classes are 120 MB; their names stay, loading one fails.
RUN set -eu; cd /opt/venv/lib/python3*/site-packages/kubernetes; \
    rm -rf docs e2e_test test aio/docs aio/test; \
    for generated in client aio/client; do \
      find "$generated/api" "$generated/models" -name '*.py' ! -name __init__.py -delete; \
    done

# The final root: the files of these packages, without what only people read. status.d is where scanners look for
# what is installed when there is no dpkg.
RUN set -eu; mkdir -p /rootfs; \
    packages="base-files libc6 libgcc-s1 zlib1g libexpat1 libssl3t64 libffi8 libbz2-1.0 liblzma5 libuuid1 libzstd1 libsqlite3-0 \
      python3.13 python3.13-minimal libpython3.13-minimal libpython3.13-stdlib ca-certificates tzdata media-types netbase"; \
    dpkg -L $packages | sort -u \
      | grep -vE '^/usr/share/(doc|man|lintian|locale|bash-completion|applications|pixmaps)/|/gconv/|^/\.$' >/tmp/files; \
    tar -C / --no-recursion -cf - -T /tmp/files 2>/dev/null | tar -C /rootfs -xf -; \
    for package in $packages; do \
      notice=/usr/share/doc/$package/copyright; \
      if [ -e $notice ]; then install -D -m644 $notice /rootfs$notice; fi; \
      install -d /rootfs/var/lib/dpkg/status.d; dpkg-query -s $package >/rootfs/var/lib/dpkg/status.d/$package; \
    done; \
    install -D -m644 /etc/ssl/certs/ca-certificates.crt /rootfs/etc/ssl/certs/ca-certificates.crt; \
    install -d -m1777 /rootfs/tmp; \
    printf 'root:x:0:0:root:/root:/sbin/nologin\nsftjob:x:10001:10001:sftjob:/tmp:/sbin/nologin\n' >/rootfs/etc/passwd; \
    printf 'root:x:0:\nsftjob:x:10001:\n' >/rootfs/etc/group; \
    cp -P /usr/bin/python3 /rootfs/usr/bin/; ldconfig -r /rootfs; rm -rf /rootfs/var/cache/ldconfig; \
    cp -a --parents /opt/venv /rootfs

COPY api/sft_api /tmp/source/sft_api
COPY operator/sft_operator /tmp/source/sft_operator
RUN chmod -R u=rwX,go=rX /tmp/source && cp -R /tmp/source/. /rootfs/opt/venv/lib/python3*/site-packages/

# Bytecode of the modules that the operator loads, and of no others: under a root that nobody can write, each start would
# compile them anew (2 s of a core). That they load at all, in the final root, is the build's own check.
RUN chroot /rootfs /opt/venv/bin/python -B -c 'import py_compile, sys; \
    import sft_operator.__main__, kubernetes.aio.client, kubernetes.aio.config; \
    files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]; \
    [py_compile.compile(file, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH) \
      for file in files if file.endswith(".py")]'

FROM scratch
ARG VERSION=0 REVISION=unknown
LABEL org.opencontainers.image.title="sftjob operator" \
      org.opencontainers.image.description="Turns SFTJobs into gangs of pods that fine-tune language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /rootfs /
ENV PATH=/opt/venv/bin:/usr/bin LANG=C.UTF-8 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 10001:10001
ENTRYPOINT ["/opt/venv/bin/python", "-m", "sft_operator"]
