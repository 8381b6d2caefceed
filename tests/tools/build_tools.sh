#!/usr/bin/env bash
# Builds the servers that tests talk to, each at one pinned version, into ${SFTJOB_CACHE:-~/.cache/sftjob}/bin:
# an S3 server, and what the test cluster is made of. Needs Go; does nothing where the pinned version is there already.
set -euo pipefail
cd "$(dirname "$0")/../.."

cache="${SFTJOB_CACHE:-$HOME/.cache/sftjob}"
bin="$cache/bin"
# Set once for all: the first of these decides what compiled packages may be shared.
export CGO_ENABLED=0
version=k8s.io/component-base/version
kubernetes_version="-X $version.gitVersion=v1.37.2 -X $version.gitMajor=1 -X $version.gitMinor=37 -X k8s.io/client-go/pkg/version.gitVersion=v1.37.2"

say() { echo "tools: $*" >&2; }

# The module version that a Go program was built from, as the program itself has it.
built_version() { go version -m "$1" 2>/dev/null | awk '$1 == "mod" { print $3 }'; }

# Into a folder of its own first: tests may be running the old one, or another build be under way.
fresh_folder() { mktemp -d "$cache/.build-XXXXXX"; }

# install_program NAME PACKAGE VERSION MINUTES: a program whose own module pins all it needs.
install_program() {
  if [ "$(built_version "$bin/$1")" = "$3" ]; then
    say "$1 $3 is there: $bin/$1"
    return
  fi
  say "building $1 $3 into $bin (about $4 minutes)"
  local fresh
  fresh="$(fresh_folder)"
  env -u CGO_ENABLED GOBIN="$fresh" nice go install "$2@$3"
  mv -f "$fresh/$1" "$bin/$1"
  rmdir "$fresh"
  say "$1 $3 is built"
}

# build_program NAME PACKAGE LDFLAGS MINUTES: a program that a module of ours, tests/cluster/go/NAME, pins.
build_program() {
  local module="tests/cluster/go/$1" stamp fresh
  stamp="$({ echo "$2 $3" && cat "$module"/go.mod "$module"/go.sum "$module"/*.go; } | sha256sum)"
  if [ -x "$bin/$1" ] && [ "$(cat "$cache/stamps/$1" 2>/dev/null)" = "$stamp" ]; then
    say "$1 is there: $bin/$1"
    return
  fi
  say "building $1 into $bin (about $4 minutes)"
  fresh="$(fresh_folder)"
  (cd "$module" && nice go build -trimpath -buildvcs=false -ldflags "$3" -o "$fresh/$1" "$2")
  mv -f "$fresh/$1" "$bin/$1"
  rmdir "$fresh"
  echo "$stamp" >"$cache/stamps/$1"
  say "$1 is built"
}

# The training operator's own manifests, for PyTorchJobs alone: tests/cluster/go/training-operator/overlay.
render_training_operator() {
  local module=tests/cluster/go/training-operator manifests="$cache/share/training-operator.yaml" stamp fresh
  stamp="$(cat "$module/go.sum" "$module/overlay/kustomization.yaml" | sha256sum)"
  [ -e "$manifests" ] && [ "$(cat "$cache/stamps/training-operator.yaml" 2>/dev/null)" = "$stamp" ] && return
  fresh="$(fresh_folder)"
  cp -r "$(cd "$module" && go list -m -f '{{.Dir}}' github.com/kubeflow/training-operator)/manifests/." "$fresh"
  chmod -R u+w "$fresh"
  cp -r "$module/overlay" "$fresh/overlay"
  # The binary is kubectl under any name that is none of its other programs'.
  "$bin/kubernetes" kustomize "$fresh/overlay" >"$fresh/rendered.yaml"
  mv -f "$fresh/rendered.yaml" "$manifests"
  rm -r "$fresh"
  echo "$stamp" >"$cache/stamps/training-operator.yaml"
  say "the training operator's manifests are rendered: $manifests"
}

if ! command -v go >/dev/null; then
  say "go was not found: it builds the servers for the tests; see https://go.dev/dl"
  exit 1
fi
mkdir -p "$bin" "$cache/stamps" "$cache/share"
install_program versitygw github.com/versity/versitygw/cmd/versitygw v1.8.0 4
build_program kubernetes . "-s -w $kubernetes_version" 17
build_program training-operator github.com/kubeflow/training-operator/cmd/training-operator.v1 "-s -w" 5
build_program helm helm.sh/helm/v4/cmd/helm "-s -w" 4
render_training_operator
