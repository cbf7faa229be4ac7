#!/usr/bin/env bash
# The runs behind the README's table on human preferences: a small LLaMA from nothing, stage 2 alone and stage 1 then stage 2.
# usage: examples/real_data.sh TRAIN.jsonl OUTPUT_DIR TEST.jsonl ...        about half an hour on 2 CPU cores
set -euo pipefail
train=$1 out=$2
shift 2
cd "$(dirname "$0")/.."
bin=.venv/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"
[ -e "$out/tokenizer.model" ] || $bin/gram train-tokenizer --data "$train" --output "$out/tokenizer.model" --vocab-size 4096

settings=(
    --nproc-per-node 2 --num-layers 4 --hidden-size 192 --ffn-hidden-size 512 --num-attention-heads 4 --num-query-groups 2
    --untie-embeddings-and-output-weights False --init-method-std 0.05 --bf16
    --tokenizer-model "$out/tokenizer.model" --template examples/configs/quickstart-template.yaml --seq-length 640
    --data "$train" --data-cache-path "$out/cache" --preprocess-workers 2
    --micro-batch-size 4 --global-batch-size 32 --lr-warmup-fraction 0.05 --weight-decay 0.1 --log-interval 20
)
stage2=(--lr 5e-4 --label-smoothing 0.1 --train-epochs 1)
bash examples/pretrain_gram.sh "${settings[@]}" --lr 2e-3 --train-epochs 2 --save "$out/stage1"
bash examples/finetune_gram.sh "${settings[@]}" "${stage2[@]}" --pretrained-checkpoint "$out/stage1" --save "$out/both"
bash examples/finetune_gram.sh "${settings[@]}" "${stage2[@]}" --save "$out/alone"
for run in alone both; do
    $bin/gram convert --load "$out/$run" --save "$out/$run-hf"
    for test in "$@"; do
        name=$(basename "$test" .jsonl)
        $bin/gram evaluate "$test" --model "$out/$run-hf" --output-dir "$out/$run-$name" --dtype float32
    done
done
