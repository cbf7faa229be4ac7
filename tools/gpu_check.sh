#!/usr/bin/env bash
# Tests and benchmarks on a GPU in about ten minutes, with a dated results file: run it from anywhere in the repository.
# usage: tools/gpu_check.sh [--minutes 10] [--only TEXT]     WITH_TE=1: build transformer-engine and flash-attn first (long)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
if ! command -v nvidia-smi >/dev/null; then
    echo "error: no nvidia-smi here: this needs a machine with an NVIDIA GPU and its driver." >&2
    exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
bash tools/make_venv.sh "$venv"
if [ -n "${WITH_TE:-}" ]; then
    "$venv/bin/python" -m pip install --no-build-isolation -e '.[gpu]'
fi
for package in transformer_engine flash_attn; do
    "$venv/bin/python" -c "import $package" 2>/dev/null || echo "without $package: WITH_TE=1 builds it; its tests are skipped"
done
exec "$venv/bin/python" -m gram_engine.benchmarks.gpu_check "$@"
