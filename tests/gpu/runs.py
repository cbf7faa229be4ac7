"""Short training runs on the process's own device, on random packed data."""

import tempfile
from pathlib import Path

from gram_engine.benchmarks.throughput import OBJECTIVES
from gram_engine.benchmarks.workload import write_workload
from gram_engine.config.parse import parse
from gram_engine.config.validate import check
from gram_engine.model.shapes import resolve_shape

SHAPE = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 4 --num-query-groups 2 --seq-length 1024 "
    "--vocab-size 4096 --global-batch-size 8 --micro-batch-size 2 --lr 1e-3 --lr-warmup-fraction 0 --train-iters 20"
)


def trainer_of(platform, stage: str, flags: str, data: dict | None = None):
    """A Trainer of stage "1" or "2" in the process groups that are up; with `data` (fixture tiny_data) it can save."""
    from gram_engine.model.te_layers import check_gpu
    from gram_engine.training.initialise import PreparedData
    from gram_engine.training.trainer import Trainer

    config = parse([*SHAPE.split(), "--objective", OBJECTIVES[stage], *flags.split()])
    resolve_shape(config)
    check(config, data=False)
    check_gpu(config, platform)
    if data is not None:
        config.data.tokenizer_model, prefix = data["tokenizer"], data[f"stage{stage}"]
    else:
        prefix = str(Path(tempfile.mkdtemp()) / "data")
        write_workload(prefix, config.training.objective, 64, config.data.seq_length, config.model.vocab_size)
    return Trainer(config, platform, PreparedData(prefix, None, config.model.vocab_size))
