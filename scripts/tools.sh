#!/usr/bin/env bash
# Installs what only tests need: a browser for the report, an S3 server for the object store. What cannot be had
# is named, and its tests skip; where CI is set they fail instead.
set -euo pipefail
cd "$(dirname "$0")/.."
export SFTJOB_CACHE="${SFTJOB_CACHE:-$HOME/.cache/sftjob}"

left_out() { echo "tools: LEFT OUT: $*" >&2; }

install_browser() {
  command -v chromium >/dev/null && command -v chromedriver >/dev/null && return
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    left_out "the report's test in a browser; as root: apt-get install chromium chromium-driver"
    return
  fi
  echo "tools: installing chromium" >&2
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core; } \
    </dev/null >/dev/null; then
    left_out "the report's test in a browser: apt-get could not install chromium and chromium-driver"
  fi
}

# Debian's Go is too old for the S3 server; the one pinned in constraints.txt is not.
go_is_new_enough() {
  local version
  version="$(go env GOVERSION 2>/dev/null)" || return 1
  [ "$(printf '%s\n' go1.24 "${version%% *}" | sort --version-sort | head -n 1)" = go1.24 ]
}

build_s3_server() {
  go_is_new_enough || PATH="$PWD/.venv/bin:$PATH"
  tests/tools/build_tools.sh </dev/null || left_out "the tests over S3: tests/tools/build_tools.sh failed, see above"
}

install_browser
build_s3_server
