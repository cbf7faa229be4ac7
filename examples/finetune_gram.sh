#!/usr/bin/env bash
""":"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$0" "$@"
":"""
# Stage 2: the model learns to predict the label of the preferred response. This file is bash and Python at once:
#   bash examples/finetune_gram.sh FLAGS                           starts one process per GPU (NPROC_PER_NODE: another number)
#   torchrun --nproc-per-node 2 examples/finetune_gram.sh FLAGS    torchrun reads it as Python
from gram_engine.training.main import finetune

if __name__ == "__main__":
    finetune()
