"""Entry point of both stages: configuration -> processes -> data -> Trainer."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from gram_engine.config.parse import fail, parse
from gram_engine.config.schema import Config, restarts
from gram_engine.config.validate import check
from gram_engine.errors import GramError
from gram_engine.log import is_main_process
from gram_engine.model.shapes import resolve_shape

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
        _go_on_after_restart(config)
        check(config)
        if config.logging.dry_run:
            if is_main_process():
                print(config.to_yaml(), end="")
            return
        run(config)
    except GramError as error:
        fail(error)


def _go_on_after_restart(config: Config) -> None:
    """Started again by torchrun after a process died: resume from what this run has saved, if it has."""
    from gram_engine.checkpoint.folder import TRACKER

    save = config.checkpoint.save
    if restarts() and save and (Path(save) / TRACKER).is_file():
        config.checkpoint.load = save


def run(config: Config) -> dict[str, float]:
    """Train as a checked configuration says; returns the last metrics. Leaves no process group behind."""
    from gram_engine.platform import device as platforms

    hush_known_warnings()
    if config.training.deterministic_mode:
        platforms.make_deterministic()
    platform = platforms.initialise(config.parallel.device)

    import torch.distributed as dist
    from megatron.core import parallel_state

    from gram_engine.checkpoint.run_lock import only_run_in
    from gram_engine.log import log
    from gram_engine.model.te_layers import check_gpu, start_userbuffers
    from gram_engine.objectives import describe_losses
    from gram_engine.planning.pipeline_balance import Work, balance_report
    from gram_engine.training.initialise import complete_vocabulary, prepare_data, start_model_parallel, start_processes
    from gram_engine.training.trainer import Trainer

    check_gpu(config, platform)
    losses = describe_losses(config, platform.device)
    start_processes(config, platform)
    try:
        with only_run_in(config.checkpoint.save) as lock:
            start_model_parallel(config)
            start_userbuffers(config)
            prepared = prepare_data(config)
            complete_vocabulary(config, prepared)
            log(config.to_yaml())
            trainer = Trainer(config, platform, prepared)
            trainer.saver.lock = lock
            if config.parallel.pipeline_model_parallel_size > 1:
                log(balance_report(config, Work(*trainer.loader.totals())))
            log(losses)
            log(f"{platform.describe()} | {len(trainer.dataset)} samples | {trainer.total_steps} steps")
            return trainer.train()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def hush_known_warnings() -> None:
    """Optional packages that megatron-core misses, and deprecations inside it, say nothing a user could act on."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
