"""Short training runs on the process's own device, on random packed data."""

import contextlib
import tempfile
from pathlib import Path

from gram_engine.benchmarks.command import OBJECTIVES
from gram_engine.benchmarks.workload import write_workload
from gram_engine.config.parse import parse
from gram_engine.config.validate import check
from gram_engine.model.shapes import resolve_shape
from gram_engine.platform.environment import world_size
from gram_engine.training.session import session
from tests.support.tiny import train_steps

SHAPE = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 4 --num-query-groups 2 --seq-length 1024 "
    "--vocab-size 4096 --global-batch-size 8 --micro-batch-size 2 --lr 1e-3 --lr-warmup-fraction 0 --train-iters 20"
)


@contextlib.contextmanager
def trainer_of(stage: str, flags: str, data: dict | None = None):
    """A Trainer of stage "1" or "2", alone or under torchrun; with `data` (fixture tiny_data) it can save."""
    from gram_engine.training.initialise import PreparedData

    config = parse([*SHAPE.split(), "--objective", OBJECTIVES[stage], *flags.split()])
    resolve_shape(config)
    check(config, world_size(), data=False)
    with tempfile.TemporaryDirectory() as folder:
        if data is not None:
            config.data.tokenizer_model, prefix = data["tokenizer"], data[f"stage{stage}"]
        else:
            prefix = str(Path(folder) / "data")
            write_workload(prefix, config.training.objective, 64, config.data.seq_length, config.model.vocab_size)
        with session(config, PreparedData(prefix, None, config.model.vocab_size)) as trainer:
            yield trainer


def curve(stage: str, flags: str, steps: int, data: dict | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first steps of a run."""
    with trainer_of(stage, flags, data) as trainer:
        return train_steps(trainer, steps)
