#!/usr/bin/env bash
# Tests and benchmarks on a GPU in about a quarter of an hour, with a dated results file: run it from anywhere in the repository.
# usage: tools/gpu_check.sh [--minutes 15] [--only TEXT] ...    --help: all flags. WITH_TE=1: first tools/install_gpu.sh (long)
# Without a package index, with the Python (PYTHON, else python3) and the torch that the machine has:
#   tools/gpu_check.sh --offline --fetch-wheels [PACKAGE ...] [--python 3.12]    first, where pip works: into .whl, which is to be
#       copied along with the checkout, and not to be committed
#   tools/gpu_check.sh --offline [--minutes 15] ...                              then, on the GPU
# environment: VENV (.venv), WHEELS (.whl), GRAM_CUDA_ARCHS (this GPU's; what --offline compiles the kernels for)
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --offline ]; then
    shift
    exec "${PYTHON:-python3}" -m gram_engine.benchmarks.offline "$@"
fi
export VENV=${VENV:-.venv}
if ! command -v nvidia-smi >/dev/null; then
    echo "error: no nvidia-smi here: this needs a machine with an NVIDIA GPU and its driver." >&2
    exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
bash tools/make_venv.sh "$VENV"
if [ -n "${WITH_TE:-}" ]; then
    bash tools/install_gpu.sh
fi
exec "$VENV/bin/python" -m gram_engine.benchmarks.gpu_check "$@"
