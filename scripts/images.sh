#!/usr/bin/env bash
# Builds the images and leaves them as archives: build/images/operator.tar, build/images/trainer.tar.
#
#   scripts/images.sh [operator] [trainer]     both, unless named
#
# ENGINE      docker, podman or buildah; the first of them that works, unless named
# REPOSITORY  what the images are called: $REPOSITORY/operator, $REPOSITORY/sft-trainer
# FLASH_ATTN  1 compiles FlashAttention into the trainer's (hours); 0, the default, does not
#
# An archive whose inputs have not changed is left as it is. Where buildah has no Debian to begin from and can pull none,
# mmdebstrap makes one. An index of packages and the certificates of a proxy come from pip's own settings
# (PIP_INDEX_URL, PIP_CERT), as secrets of the build: nothing of them is in an image.
set -euo pipefail
cd "$(dirname "$0")/.."

CACHE="${SFTJOB_CACHE:-$HOME/.cache/sftjob}"
REPOSITORY="${REPOSITORY:-ghcr.io/sftjob}"
FLASH_ATTN="${FLASH_ATTN:-0}"
BASE=docker.io/library/debian:13-slim
VERSION="$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)"
OUT=build/images
NO_ENGINE=77

say() { echo "images: $*" >&2; }

engine_works() {
  case "$1" in
  docker) docker info >/dev/null 2>&1 ;;
  podman) podman info >/dev/null 2>&1 ;;
  buildah) command -v buildah >/dev/null && [ "$(id -u)" -eq 0 ] ;;
  *) return 1 ;;
  esac
}

find_engine() {
  local candidate
  for candidate in ${ENGINE:-docker podman buildah}; do
    if engine_works "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  say "LEFT OUT: no container engine works here (${ENGINE:-docker, podman, or buildah as root}); on Debian, as root: apt-get install buildah mmdebstrap"
  return "$NO_ENGINE"
}

# buildah with a store of its own, which can be deleted and touches nobody else's.
in_store() {
  buildah --root "$CACHE/buildah" --runroot "$CACHE/buildah-run" --storage-driver "${STORAGE_DRIVER:-overlay}" "$@"
}

# The sources of Debian 13, from the mirror that this machine's apt uses.
debian_sources() {
  local uris main security
  uris="$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
    grep -v '^ *#' | grep -oE 'https?://[^ ]+' | sed 's:/*$::' || true)"
  main="$(grep -m 1 '/debian$' <<<"$uris")" || {
    say "apt's sources on this machine name no Debian mirror to make $BASE from"
    return 1
  }
  security="$(grep -m 1 '/debian-security$' <<<"$uris" || true)"
  echo "deb $main trixie main"
  echo "deb $main trixie-updates main"
  [ -z "$security" ] || echo "deb $security trixie-security main"
}

make_base() {
  command -v mmdebstrap >/dev/null || {
    say "$BASE is not here and could not be pulled; with mmdebstrap it could be made: apt-get install mmdebstrap"
    return 1
  }
  say "making $BASE (a minute)"
  local work container
  work="$(mktemp -d)"
  debian_sources | mmdebstrap --quiet --variant=minbase --mode=root --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook='rm -f "$1/etc/resolv.conf" "$1/etc/hostname"' \
    trixie "$work/base.tar" -
  container="$(in_store from scratch)"
  in_store add --quiet "$container" "$work/base.tar" / >/dev/null
  in_store config --cmd bash "$container"
  in_store commit --quiet "$container" "$BASE" >/dev/null
  in_store rm "$container" >/dev/null
  rm -r "$work"
}

ensure_base() {
  in_store inspect --type image "$BASE" >/dev/null 2>&1 || in_store pull --quiet "$BASE" >/dev/null 2>&1 || make_base
}

# Sets the array `secrets` to what pip's settings ask for.
find_secrets() {
  local authorities="${PIP_CERT:-${SSL_CERT_FILE:-}}"
  secrets=()
  if [ -s "$authorities" ]; then secrets+=(--secret "id=ca,src=$authorities"); fi
  if [ -n "${PIP_INDEX_URL:-}" ]; then
    (umask 077 && printf '[global]\nindex-url = %s\n' "$PIP_INDEX_URL" >"$private/pip.conf")
    secrets+=(--secret "id=pip,src=$private/pip.conf")
  elif [ -s "${PIP_CONFIG_FILE:-/etc/pip.conf}" ]; then
    secrets+=(--secret "id=pip,src=${PIP_CONFIG_FILE:-/etc/pip.conf}")
  fi
}

# The files that go into an image: its Dockerfile and what that copies.
inputs_of() {
  local dockerfile="$1"
  echo "$dockerfile" .dockerignore
  sed -n 's/^COPY \([a-z_]*\/[^ ]*\) .*/\1/p' "$dockerfile"
}

files_of() {
  local input
  for input in "$@"; do find "$input" -type f ! -path '*/__pycache__/*'; done | LC_ALL=C sort
}

hash_of() { { files_of "$@" | xargs -d '\n' sha256sum; echo "$REPOSITORY $VERSION $FLASH_ATTN"; } | sha256sum | cut -d ' ' -f 1; }

# The last commit that changed an input: the same sources make the same image, whatever else was committed since.
last_commit() { git log -1 --format="$1" -- "${inputs[@]}" 2>/dev/null || true; }

build() {
  local name="$1" dockerfile="$2" tag="$REPOSITORY/$3:$VERSION" archive="$OUT/$1.tar" stamp inputs arguments
  read -r -a inputs <<<"$(inputs_of "$dockerfile" | tr '\n' ' ')"
  stamp="$(hash_of "${inputs[@]}")"
  if [ -f "$archive" ] && [ "$(cat "$archive.inputs" 2>/dev/null)" = "$stamp" ]; then
    say "$archive is current"
    return
  fi
  arguments=(--file "$dockerfile" --tag "$tag" --build-arg "BASE=$BASE" --build-arg "VERSION=$VERSION"
    --build-arg "REVISION=$(last_commit %H)")
  if [ "$name" = trainer ]; then arguments+=(--build-arg "FLASH_ATTN=$FLASH_ATTN"); fi
  export SOURCE_DATE_EPOCH
  SOURCE_DATE_EPOCH="$(last_commit %ct)"
  SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"
  say "building $tag with $engine"
  rm -f "$archive" "$archive.inputs"
  "build_with_$engine"
  echo "$stamp" >"$archive.inputs"
  say "$archive: $tag, $(du -h "$archive" | cut -f 1)"
}

build_with_docker() {
  docker build --provenance=false "${secrets[@]}" "${arguments[@]}" .
  docker save --output "$archive" "$tag"
}

build_with_podman() {
  podman build --format docker --timestamp "$SOURCE_DATE_EPOCH" "${secrets[@]}" "${arguments[@]}" .
  podman save --quiet --format docker-archive --output "$archive" "$tag"
}

build_with_buildah() {
  local replaced
  ensure_base
  replaced="$(in_store images --quiet --no-trunc "$tag" 2>/dev/null || true)"
  in_store bud --quiet --isolation chroot --layers --pull-never --format docker --timestamp "$SOURCE_DATE_EPOCH" \
    "${secrets[@]}" "${arguments[@]}" . >/dev/null
  in_store push --quiet "$tag" "docker-archive:$archive:$tag"
  if [ -n "$replaced" ] && [ "$replaced" != "$(in_store images --quiet --no-trunc "$tag")" ]; then
    in_store rmi "$replaced" >/dev/null
  fi
}

engine="$(find_engine)"
private="$(mktemp -d)"
trap 'rm -rf "$private"' EXIT
find_secrets
mkdir -p "$OUT"
if [ $# -eq 0 ]; then set -- operator trainer; fi
for wanted in "$@"; do
  case "$wanted" in
  operator) build operator Dockerfile operator ;;
  trainer) build trainer trainer_image/Dockerfile sft-trainer ;;
  *) say "there is no image '$wanted'; there are operator and trainer" && exit 64 ;;
  esac
done
