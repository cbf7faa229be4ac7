"""Entry point of both stages: command line -> checked configuration -> session -> Trainer.train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Iterator

from gram_engine.config.parse import fail, parse
from gram_engine.config.schema import Config
from gram_engine.config.validate import check
from gram_engine.errors import GramError
from gram_engine.log import is_main_process, log
from gram_engine.model.shapes import resolve_shape
from gram_engine.platform.environment import restarts, world_size
from gram_engine.training.session import session

if TYPE_CHECKING:
    from gram_engine.training.trainer import Trainer

PRETRAIN_DEFAULTS = ("--objective", "response-lm", "--lr", "2e-5")
FINETUNE_DEFAULTS = ("--objective", "pair-preference", "--lr", "1e-5")


def pretrain(argv: list[str] | None = None) -> None:
    """Stage 1: learn to generate both responses, without labels."""
    main(argv, "gram pretrain", PRETRAIN_DEFAULTS)


def finetune(argv: list[str] | None = None) -> None:
    """Stage 2: learn to predict the preferred response's label."""
    main(argv, "gram finetune", FINETUNE_DEFAULTS)


def main(argv: list[str] | None, prog: str, defaults: tuple[str, ...]) -> None:
    """Run one stage with the flags of `argv` (default: the command line); `defaults` come before them."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv, prog, defaults)
        resolve_shape(config)
        _resume_after_restart(config)
        check(config, world_size())
        if config.logging.dry_run:
            if is_main_process():
                print(config.to_yaml(), end="")
            return
        run(config)
    except GramError as error:
        fail(error)


def _resume_after_restart(config: Config) -> None:
    """Where torchrun has restarted a run after a process died, load the last checkpoint that the run saved, if there is one."""
    from gram_engine.checkpoint.folder import TRACKER

    save = config.checkpoint.save
    if restarts() and save and (Path(save) / TRACKER).is_file():
        config.checkpoint.load = save


def run(config: Config) -> dict[str, float]:
    """Train as a checked configuration says; returns the last metrics. Leaves no process group behind."""
    with session(config) as trainer:
        for line in _describe(trainer):
            log(line)
        return trainer.train()


def _describe(trainer: Trainer) -> Iterator[str]:
    """What is logged before the first step: configuration, pipeline balance, losses, device and amount of work."""
    from gram_engine.objectives import describe_losses
    from gram_engine.planning.pipeline_balance import Work, balance_report

    config, platform = trainer.config, trainer.platform
    yield config.to_yaml()
    if config.parallel.pipeline_model_parallel_size > 1:
        yield balance_report(config, Work(*trainer.loader.totals()))
    yield describe_losses(config, platform.device)
    yield f"{platform.describe()} | {len(trainer.dataset)} samples | {trainer.total_steps} steps"
