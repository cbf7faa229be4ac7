#!/usr/bin/env bash
#SBATCH --job-name=gram
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=runs/%x-%j.log
#
# Both stages on a Slurm cluster: one launcher per node, which starts one process per GPU.
#   sbatch examples/slurm.sh DATA.jsonl HF_FOLDER [further flags for both stages]
# Five minutes before its time is over the job saves, leaves and puts itself into the queue again; it goes on where the last
# checkpoint left off (--load). The repository, the data and runs/ must lie on a file system that every node sees.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
data=$1 base=$2
shift 2

endpoint=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((29500 + SLURM_JOB_ID % 1000))
launcher=(--nnodes "$SLURM_NNODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$endpoint")
model=(--config examples/configs/llama-3.1-8b.yaml --data "$data" --tokenizer-model "$base")

stopped=
step=
trap 'stopped=1; kill -USR1 "$step"' USR1

train() {
    local status=0
    srun bash "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` before the step has ended
        wait "$step" && status=0 || status=$?
    done
    if [ -n "$stopped" ]; then # it has saved; the next stage must not begin from half of this one
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    return "$status"
}

train examples/pretrain_gram.sh "${launcher[@]}" "${model[@]}" --config examples/configs/stage1-paper.yaml \
    --load-hf "$base" --save runs/stage1 --load runs/stage1 "$@"
train examples/finetune_gram.sh "${launcher[@]}" "${model[@]}" --config examples/configs/stage2-paper.yaml \
    --pretrained-checkpoint runs/stage1 --save runs/stage2 --load runs/stage2 "$@"
