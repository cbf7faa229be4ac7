#!/usr/bin/env bash
# Loads exports of this engine in other people's programs, each in an environment of its own, and compares the numbers with ours.
# usage: tools/check_peers.sh [FOLDER [NAME ...]]     FOLDER: runs/peers; NAME: transformers rewardbench trl openrlhf lm_eval (all)
# Writes FOLDER/table.md, prints it, and exits with 1 if a program fails or a number differs. It needs the package index, 3 GB of
# disk and about 20 minutes on two cores; environments that are complete are used again. SMOLLM2 names a folder of
# tools/get_smollm2.py (default runs/SmolLM2-135M-Instruct), which is tried beside a small random model.
# environment: VENV (.venv), SMOLLM2
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-runs/peers}")
names=("${@:2}")
[ ${#names[@]} -gt 0 ] || names=(transformers rewardbench trl openrlhf lm_eval)
python=${VENV:-.venv}/bin/python
if [ ! -x "$python" ]; then
    echo "error: no $python. Run make venv first (or name an environment: VENV=...)." >&2
    exit 2
fi
for name in "${names[@]}"; do
    if [ ! -f "tools/peers/$name.txt" ]; then
        echo "error: $name: unknown program. Give some of: transformers rewardbench trl openrlhf lm_eval" >&2
        exit 2
    fi
done

# All environments borrow torch, which is large, from the project's, and nothing else.
borrow_torch() {
    local packages package
    packages=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
    mkdir -p "$folder/torch"
    for package in "$packages"/{torch,torchgen,functorch,nvidia,triton,torch-*.dist-info}; do
        [ ! -e "$package" ] || ln -sfn "$package" "$folder/torch/"
    done
}

# Each line of a requirements file that begins with --no-deps is installed alone, without what it asks for.
make_environment() {
    local venv=$folder/venvs/$1 requirements=tools/peers/$1.txt wanted alone
    wanted=$(sha256sum <"$requirements")
    [ "$(cat "$venv/.done" 2>/dev/null)" != "$wanted" ] || return 0
    rm -rf "$venv"
    "$python" -m venv "$venv"
    echo "$folder/torch" >"$(echo "$venv"/lib/python3.*/site-packages)/torch_of_the_project.pth"
    grep -v '^--no-deps' "$requirements" | "$venv/bin/python" -m pip install --quiet torch -r /dev/stdin || return 1
    while read -ra alone; do
        "$venv/bin/python" -m pip install --quiet "${alone[@]}" || return 1
    done < <(grep '^--no-deps' "$requirements")
    echo "$wanted" >"$venv/.done"
}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 WANDB_MODE=offline CUDA_VISIBLE_DEVICES="" PIP_DISABLE_PIP_VERSION_CHECK=1
borrow_torch
PYTHONPATH=$PWD "$python" tools/peers/exports.py "$folder" "${SMOLLM2:-runs/SmolLM2-135M-Instruct}" >"$folder/exports.log" 2>&1 ||
    { tail -5 "$folder/exports.log" >&2; exit 2; }
for name in "${names[@]}"; do
    echo "$name: $folder/$name.log" >&2
    rm -f "$folder/results/$name.json"
    { make_environment "$name" && "$folder/venvs/$name/bin/python" "tools/peers/check_$name.py" "$folder"; } \
        >"$folder/$name.log" 2>&1 || echo "$name failed" >&2
done
PYTHONPATH=$PWD exec "$python" tools/peers/compare.py "$folder" "${names[@]}"
