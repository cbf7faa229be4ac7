#!/usr/bin/env bash
# Makes or reuses a virtual environment with the pinned requirements and this package (editable).
# usage: tools/make_venv.sh FOLDER     A second call with unchanged requirements returns at once.  environment: PYTHON, PYENV_ROOT
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
stamp=$venv/.requirements.sha256
supported="3.11, 3.12 or 3.13"

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }
is_supported() { [[ "$1" =~ ^3\.1[123](\.|$) ]]; }
minor_of() { cut -d. -f1,2 <<<"$1"; }

find_python() {
    local candidate version found="" candidates=("${PYTHON:-}")
    if [ -z "${PYTHON:-}" ]; then
        candidates=(python3 python3.11 python3.12 python3.13 python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python)
    fi
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate") || continue
        if ! is_supported "$version"; then
            found+="${found:+, }$candidate is $version"
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            found+="${found:+, }$candidate is $version without the venv module"
        else
            echo "$candidate"
            return
        fi
    done
    echo "error: Python $supported with the venv module is needed (${found:-none found${PYTHON:+ as $PYTHON}}). Debian or Ubuntu:" \
        "apt-get install python3.12 python3.12-venv; pyenv: pyenv install 3.12. Or name one: make PYTHON=/path/to/python" >&2
    return 1
}

# An existing environment has a supported Python, and the one that PYTHON asks for.
check_venv() {
    local has asked="" mend="rm -r $venv, then again (or keep it, and name another folder: make VENV=.venv-other)"
    has=$(version_of "$venv/bin/python") || has="a Python that does not start"
    if [ -n "${PYTHON:-}" ]; then
        asked=$(version_of "$PYTHON") || asked="not found"
    fi
    if ! is_supported "$has"; then
        echo "error: $venv has Python $has, and $supported is needed: $mend" >&2
    elif [ -n "$asked" ] && [ "$(minor_of "$asked")" != "$(minor_of "$has")" ]; then
        echo "error: $venv has Python $has, and PYTHON=$PYTHON is $asked: $mend" >&2
    else
        return 0
    fi
    return 1
}

fingerprint() {
    { cat requirements.txt requirements-dev.txt setup.py gram_engine/install/toolchain.py tools/make_venv.sh csrc/*; pwd; command -v g++ nvcc || true; } | sha256sum
}

if [ -x "$venv/bin/python" ]; then
    check_venv
else
    python=$(find_python)
fi
wanted=$(fingerprint)
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
if [ -n "${python:-}" ]; then
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
