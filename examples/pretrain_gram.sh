#!/usr/bin/env bash
""":"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" "$0" "$@"
":"""
# Stage 1: the model learns to generate both responses of unlabelled pairs. This file is bash and Python at once:
#   bash examples/pretrain_gram.sh FLAGS                           starts one process per GPU (NPROC_PER_NODE: another number)
#   torchrun --nproc-per-node 2 examples/pretrain_gram.sh FLAGS    torchrun reads it as Python
from gram_engine.training.main import pretrain

if __name__ == "__main__":
    pretrain()
