"""An uninterrupted run and a resumed one, to be called in the workers of the pool."""

from __future__ import annotations

from tests.support.tiny import tiny_config, tiny_trainer, train_steps


def uninterrupted(prefix: str, tokenizer_model: str, flags: str, folder, steps: int = 2) -> list[tuple[float, float]]:
    """Train `steps` steps, save into `folder`, and return (loss, gradient norm) of the next `steps`."""
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{flags} --save {folder}"))
    train_steps(trainer, steps)
    trainer.save()
    curve = train_steps(trainer, steps)
    trainer.saver.finish()
    return curve


def resumed(prefix: str, tokenizer_model: str, flags: str, folder, steps: int = 2) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the `steps` steps after the checkpoint that `uninterrupted` saved."""
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, f"{flags} --load {folder}"))
    batch_size = trainer.config.training.global_batch_size
    assert (trainer.state.iteration, trainer.state.consumed_samples) == (steps, steps * batch_size)
    return train_steps(trainer, steps)
