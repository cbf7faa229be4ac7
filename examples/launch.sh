#!/usr/bin/env bash
# What pretrain_gram.sh and finetune_gram.sh do when bash runs them: pick the Python, then start the processes,
# or, where torchrun --no-python or a scheduler has already started this one, become the trainer.
# usage: launch.sh SCRIPT [torchrun's and the trainer's flags]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
    [ -n "${VIRTUAL_ENV:-}" ] && PYTHON=$VIRTUAL_ENV/bin/python
fi
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("gram_engine") is None)'; then
    echo "error: $PYTHON has no gram_engine. Run \`make venv\` in $root, or set PYTHON to an interpreter that has it." >&2
    exit 2
fi
if [ -n "${RANK:-}" ] && [ -n "${WORLD_SIZE:-}" ]; then
    exec "$PYTHON" -u "$@"
fi
exec "$PYTHON" -m gram_engine.training.launch "$@"
