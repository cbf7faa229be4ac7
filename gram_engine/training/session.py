"""Start and end of a run, the same for training, benchmarks and tests: platform, process groups, data, Trainer.

    with session(config) as trainer:
        trainer.train()          # or trainer.advance(), step by step

megatron-core is imported by the functions, not at the top: the platform has to be chosen first (platform/cpu.py).
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Iterator

from gram_engine.config.schema import Config
from gram_engine.platform import device as platforms

if TYPE_CHECKING:
    from gram_engine.training.initialise import PreparedData
    from gram_engine.training.trainer import Trainer


@contextlib.contextmanager
def session(config: Config, prepared: PreparedData | None = None) -> Iterator[Trainer]:
    """Everything from the device to the Trainer for a resolved and checked `config`; no process group is left at the end.

    Under torchrun every process calls it. While the block runs, no other run can save to the folder of --save.

    Args:
        prepared: data that the caller has written, instead of what --data or --data-path name.

    Raises:
        GramError: this machine cannot do what `config` asks for, the data cannot be used, a checkpoint cannot be loaded, or
            another run saves to the same folder.
    """
    hush_known_warnings()
    if config.training.deterministic_mode:
        platforms.make_deterministic()
    platform = platforms.initialise(config.parallel.device)

    import torch.distributed as dist
    from megatron.core import parallel_state

    from gram_engine.checkpoint.run_lock import only_run_in
    from gram_engine.model.te_layers import check_gpu
    from gram_engine.objectives import describe_losses
    from gram_engine.training.initialise import start_processes

    check_gpu(config, platform)
    describe_losses(config, platform.device)  # refuses GRAM_KERNELS that cannot run here
    start_processes(config, platform)
    try:
        with only_run_in(config.checkpoint.save) as lock:
            trainer = build_trainer(config, platform, prepared)
            trainer.saver.lock = lock
            try:
                yield trainer
            finally:
                trainer.close()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_trainer(config: Config, platform: platforms.Platform, prepared: PreparedData | None = None) -> Trainer:
    """A Trainer in the default process group, which is up: megatron-core's groups and seeds, data, vocabulary, model.

    The caller destroys all groups; `prepared` is as for `session`.
    """
    from gram_engine.model.te_layers import start_userbuffers
    from gram_engine.training.initialise import complete_vocabulary, prepare_data, start_model_parallel
    from gram_engine.training.trainer import Trainer

    start_model_parallel(config)
    start_userbuffers(config)
    if prepared is None:
        prepared = prepare_data(config)
    complete_vocabulary(config, prepared)
    return Trainer(config, platform, prepared)


def hush_known_warnings() -> None:
    """Hide warnings about megatron-core's optional packages and about deprecated calls inside it: no user can act on them."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
