"""Training objectives, one file each; `build_objective` makes the one that the configuration names (config/task.py)."""

from __future__ import annotations

import importlib

import torch
import torch.distributed as dist

from gram_engine.config.schema import Config
from gram_engine.objectives.base import Objective, ObjectiveOutput

__all__ = ["Objective", "ObjectiveOutput", "build_objective", "describe_losses"]


def build_objective(config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup) -> Objective:
    """The objective of this run; `label_ids` are those of the data's manifest (None if its task has no label tokens)."""
    return _loss_class(config)(config, label_ids, tp_group)


def describe_losses(config: Config, device: torch.device) -> str:
    """One line for the log: the loss, and which kernels compute it.

    Raises:
        ConfigError: GRAM_KERNELS names kernels that cannot run here.
    """
    if not config.training.fused_losses:
        return "losses: plain PyTorch"
    return f"losses: {_loss_class(config).describe(config, device)}"


def _loss_class(config: Config) -> type[Objective]:
    module, name = config.task.loss.split(":")
    return getattr(importlib.import_module(module), name).variant(config)
