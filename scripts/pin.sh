#!/usr/bin/env bash
# Writes constraints.txt: every dependency of pyproject.toml, pinned with hashes, and no index named; and from it
# the requirements of the two images, which are its pins and no others.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
  .venv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 \
    --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet "$@"
}

compile --all-extras --output-file constraints.txt "$@"
compile --extra operator --constraints constraints.txt --output-file operator/requirements.txt
compile --extra trainer --constraints constraints.txt --output-file trainer_image/requirements.txt
