#!/usr/bin/env bash
# Makes or reuses a virtual environment with the pinned requirements and this package (editable).
# usage: tools/make_venv.sh FOLDER     A second call with unchanged requirements returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
stamp=$venv/.requirements.sha256

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
        then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or 3.12 with the venv module is needed; none of ${PYTHON:+$PYTHON, }python3, python3.11," \
        "python3.12 is one. On Debian or Ubuntu: apt-get install python3.11 python3.11-venv. Or name one: make PYTHON=/path/to/python" >&2
    return 1
}

fingerprint() {
    { cat requirements.txt requirements-dev.txt setup.py tools/make_venv.sh csrc/*; pwd; command -v g++ nvcc || true; } | sha256sum
}

wanted=$(fingerprint)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
if ! [ -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "Installing the requirements into $venv (some minutes on a slow line)"
pip install --quiet -r requirements.txt -r requirements-dev.txt
build_log=$(mktemp)
GRAM_BUILD_LOG=$build_log pip install --quiet --no-deps --no-build-isolation --editable .
grep '^gram_engine: ' "$build_log" || true
rm -f "$build_log"
printf '%s\n' "$wanted" >"$stamp"
echo "$venv is ready ($("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'))"
