#!/usr/bin/env bash
# The GPU's numbers in one go: bash benchmarks/gpu.sh [options of benchmarks.gpu]
# PYTHON names an interpreter with torch, transformers, peft and rich (default: .venv's, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
commit=$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || true)
HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
  exec "$python" -m benchmarks.gpu --commit "$commit" "$@"
