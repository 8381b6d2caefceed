#!/usr/bin/env bash
# Writes constraints.txt: every dependency of pyproject.toml, pinned with hashes, and no index named; and the
# requirements of the two images, which are pins of constraints.txt, and what the trainer's compiles FlashAttention from.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
  .venv/bin/uv pip compile --universal --python-version 3.11 \
    --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet "$@"
}

compile pyproject.toml --all-extras --output-file constraints.txt "$@"
compile pyproject.toml --extra operator --constraints constraints.txt --output-file operator/requirements.txt
compile pyproject.toml --extra trainer --constraints constraints.txt --output-file trainer_image/requirements.txt
# The compiler is that of the CUDA which PyTorch was built with.
cuda="$(.venv/bin/python -c 'import torch; print(torch.version.cuda)')"
printf '%s\n' 'flash-attn~=2.8.3' "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-nvcc==$cuda.*" "nvidia-nvvm==$cuda.*" |
  compile - --no-deps --output-file trainer_image/flash-attn.txt
