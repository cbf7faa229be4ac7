"""Training objectives, one file each; `build_objective` makes the one the configuration names."""

from __future__ import annotations

import torch.distributed as dist

from gram_engine.config import Config
from gram_engine.objectives.base import Objective, ObjectiveOutput
from gram_engine.objectives.pair_preference import PairPreference
from gram_engine.objectives.response_lm import ResponseLM

__all__ = ["Objective", "ObjectiveOutput", "build_objective"]


def build_objective(config: Config, label_ids: tuple[int, int] | None, tp_group: dist.ProcessGroup) -> Objective:
    """The objective of this run; label_ids come from the data's manifest (None for stage 1)."""
    shared = dict(tp_group=tp_group, sequence_parallel=config.parallel.sequence_parallel)
    if config.training.objective == "response-lm":
        return ResponseLM(vocab_size=config.model.vocab_size, chunk_size=config.training.logits_chunk_size, **shared)
    return PairPreference(label_ids=label_ids, label_smoothing=config.training.label_smoothing, **shared)
