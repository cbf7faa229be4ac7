#!/usr/bin/env bash
# Transformer Engine and flash-attn into the virtual environment, compiled for this machine's GPU (half an hour or more).
# usage: tools/install_gpu.sh [--check]     --check: say what is missing or would be built, and stop. environment: VENV, MAX_JOBS, CUDA_HOME
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash tools/make_venv.sh "$venv"
exec "$venv/bin/python" -m gram_engine.install.gpu "$@"
