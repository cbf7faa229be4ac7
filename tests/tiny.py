"""A tiny model's flags and runs of it, for tests that train: shared by the parity, packing and resume tests."""

from __future__ import annotations

from gram_engine.config import Config, parse

SHAPE = (
    "--num-layers 6 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
    "--seq-length 192 --global-batch-size 8 --micro-batch-size 1 --lr 3e-3 --lr-warmup-fraction 0 --train-iters 20"
)


def tiny_config(prefix: str, tokenizer_model: str, flags: str = "") -> Config:
    """Resolved configuration of a six-layer model (so that 2 and 3 pipeline stages, and virtual ones, fit)."""
    from gram_engine.validation import resolve_shape

    config = parse([*SHAPE.split(), "--data-path", prefix, "--tokenizer-model", tokenizer_model, *flags.split()])
    resolve_shape(config)
    return config


def tiny_trainer(config: Config):
    """A Trainer in the process group that is up; the caller (the pool) destroys the groups."""
    from gram_engine import platform
    from gram_engine.training.initialise import complete_vocabulary, prepare_data, start_model_parallel
    from gram_engine.training.loop import Trainer

    where = platform.initialise("cpu")
    start_model_parallel(config)
    prepared = prepare_data(config)
    complete_vocabulary(config, prepared)
    return Trainer(config, where, prepared)


def train_steps(trainer, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the next steps, advancing the trainer's state as Trainer.train does."""
    curve = []
    for _ in range(steps):
        batch = trainer.loader.batch(trainer.state.consumed_samples)
        stats, grad_norm = trainer.step(batch)
        trainer.state.iteration += 1
        trainer.state.consumed_samples += batch.num_samples
        curve.append((trainer.objective.metrics(stats)["loss"], grad_norm))
    return curve
