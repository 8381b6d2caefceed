#!/usr/bin/env bash
# Writes constraints.txt: every dependency of pyproject.toml, pinned with hashes, and no index named.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
  --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --output-file constraints.txt "$@"
