#!/usr/bin/env bash
# Makes .venv with exactly what constraints.txt pins, and this checkout in it. `make` calls it when a pin has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }

# Python 3.11 or later; the first that is there.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "no Python 3.11 or later was found; install one, or name it: make PYTHON=/path/to/python3"
  return 1
}

# Debian keeps venv in a package of its own.
ensure_venv_module() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null && return
  local package
  package="$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    say "installing $package"
    apt-get update -qq </dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" </dev/null >/dev/null
  else
    say "$1 has no venv module; as root: apt-get install $package"
    return 1
  fi
}

make_venv() {
  .venv/bin/python -m pip --version >/dev/null 2>&1 && return
  local python
  python="$(find_python)"
  ensure_venv_module "$python"
  say "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

# The blocks of constraints.txt (pin and hashes) of the packages named.
pins_of() {
  awk -v names=" $* " '/^[a-z0-9]/ { split($1, pin, "=="); wanted = index(names, " " pin[1] " ") } wanted' constraints.txt
}

# uv first, by pip, as it installs the rest ten times as fast; then what builds the one package that comes as
# source (deepspeed) and ourselves, so that no build fetches anything that is not pinned.
install() {
  local first=.venv/first-requirements.txt
  pins_of uv >"$first"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$first"
  pins_of setuptools wheel packaging >"$first"
  uv pip install --quiet --require-hashes -r "$first"
  # Bytecode now, once: many short processes import torch, and some machines forbid them to keep what they compile.
  uv pip install --require-hashes --no-build-isolation --compile-bytecode -r constraints.txt
  uv pip install --quiet --no-deps --no-build-isolation --editable .
}

uv() { VIRTUAL_ENV="$PWD/.venv" .venv/bin/uv "$@" </dev/null; }

rm -f .venv/.installed
make_venv
say "installing what constraints.txt pins (about 6 GB, most of it PyTorch's CUDA libraries)"
# A build must not look for a GPU or compile anything: DeepSpeed's operators are not used.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu install
touch .venv/.installed
say "done"
