#!/usr/bin/env bash
# Builds the servers that tests talk to, each at one pinned version, into ${SFTJOB_CACHE:-~/.cache/sftjob}/bin.
# Needs Go; does nothing where the pinned version is there already.
set -euo pipefail

bin="${SFTJOB_CACHE:-$HOME/.cache/sftjob}/bin"

say() { echo "tools: $*" >&2; }

# The module version that a Go program was built from, as the program itself has it.
built_version() { go version -m "$1" 2>/dev/null | awk '$1 == "mod" { print $3 }'; }

# build NAME PACKAGE VERSION MINUTES
build() {
  if [ "$(built_version "$bin/$1")" = "$3" ]; then
    say "$1 $3 is there: $bin/$1"
    return
  fi
  say "building $1 $3 into $bin (about $4 minutes)"
  # Into a folder of its own first: tests may be running the old one, or another build be under way.
  local fresh
  fresh="$(mktemp -d "$bin/.build-XXXXXX")"
  GOBIN="$fresh" nice go install "$2@$3"
  mv -f "$fresh/$1" "$bin/$1"
  rmdir "$fresh"
  say "$1 $3 is built"
}

if ! command -v go >/dev/null; then
  say "go was not found: it builds the S3 server for the tests; see https://go.dev/dl"
  exit 1
fi
mkdir -p "$bin"
build versitygw github.com/versity/versitygw/cmd/versitygw v1.8.0 4
