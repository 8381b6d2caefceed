#!/usr/bin/env bash
# Installs what only tests need: a browser for the report, an S3 server for the object store, what the test cluster is
# made of, and what builds images. What cannot be had is named, and its tests skip; where CI is set they fail instead.
set -euo pipefail
cd "$(dirname "$0")/.."
export SFTJOB_CACHE="${SFTJOB_CACHE:-$HOME/.cache/sftjob}"

left_out() { echo "tools: LEFT OUT: $*" >&2; }

# install_packages WHAT PACKAGE...: those of Debian's that are not there yet.
install_packages() {
  local what="$1" package missing=()
  shift
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ "${#missing[@]}" -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    left_out "$what; as root: apt-get install ${missing[*]}"
    return
  fi
  echo "tools: installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } </dev/null >/dev/null; then
    left_out "$what: apt-get could not install ${missing[*]}"
  fi
}

# Debian's Go is too old for what we build; the one pinned in constraints.txt is not.
go_is_new_enough() {
  local version
  version="$(go env GOVERSION 2>/dev/null)" || return 1
  [ "$(printf '%s\n' go1.26 "${version%% *}" | sort --version-sort | head -n 1)" = go1.26 ]
}

build_servers() {
  go_is_new_enough || PATH="$PWD/.venv/bin:$PATH"
  tests/tools/build_tools.sh </dev/null ||
    left_out "the tests over S3 and on a cluster: tests/tools/build_tools.sh failed, see above"
}

command -v chromium >/dev/null && command -v chromedriver >/dev/null ||
  install_packages "the report's test in a browser" chromium chromium-driver fonts-dejavu-core
# Debian's containerd would push out another one, and Docker with it.
command -v containerd >/dev/null && command -v runc >/dev/null ||
  install_packages "the tests on a cluster" containerd runc
install_packages "the tests on a cluster" containernetworking-plugins busybox-static bash-static nftables iptables \
  conntrack iproute2 ca-certificates
install_packages "the images, where there is no other engine to build them" buildah mmdebstrap
build_servers
