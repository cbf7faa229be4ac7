"""Runs megatron-core's schedule over a global batch, and sums its statistics over all processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from gram_engine.data.loader import GlobalBatch, PackedBatch
from gram_engine.model.attention import PackSequences
from gram_engine.objectives import Objective, ObjectiveOutput
from gram_engine.training.microbatches import place


@dataclass
class MicrobatchResult:
    """Result of one micro-batch on the last pipeline stage."""

    sample_ids: torch.Tensor
    output: ObjectiveOutput


def run_schedule(
    model: list, batch: GlobalBatch, objective: Objective, device: torch.device, forward_only: bool = False
) -> list[MicrobatchResult]:
    """Forward (and backward) pass over this process's micro-batches. Returns a result for each on the last stage, else []."""
    objective.start_pass(model)
    batch = place(batch, device)
    chunks = [iter(batch.microbatches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, objective=objective),
        data_iterator=chunks if len(model) > 1 else chunks[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(batch.microbatches),
        seq_length=batch.longest * parallel_state.get_context_parallel_world_size(),  # of an uncut pack
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_step(data_iterator: Iterator[PackedBatch], model, objective: Objective):
    batch = next(data_iterator)
    sequences = PackSequences(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        attention=batch.attention,
        label_attention=batch.label_attention,
        label_rows=batch.rows,
    )
    output = model(
        batch.tokens.unsqueeze(0),
        batch.position_ids.unsqueeze(0),
        None,
        packed_seq_params=sequences,
        output_processor=objective,
        output_processor_context=batch,
    )
    return output, partial(_loss, batch)


def _loss(batch: PackedBatch, output: ObjectiveOutput):
    """(loss sum, count, result): the form in which megatron-core divides the gradients by the global count."""
    kept = replace(output, loss_sum=output.loss_sum.detach())
    return output.loss_sum, output.count, MicrobatchResult(batch.sample_ids, kept)


def sum_over_processes(values: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Sum of the last stage's `values` over all processes that hold different parts, returned on every process (collective)."""
    counted_elsewhere = not objective.parts_over_tp and parallel_state.get_tensor_model_parallel_rank() > 0
    if counted_elsewhere or not parallel_state.is_pipeline_last_stage():
        values = torch.zeros_like(values)
    dist.all_reduce(values)
    return values


def summed_stats(results: list[MicrobatchResult], objective: Objective, device: torch.device) -> dict[str, float]:
    """The objective's statistics of the whole global batch, by name, on every process (collective)."""
    total = torch.zeros(len(objective.stat_names), dtype=torch.float64, device=device)
    for result in results:
        total += result.output.stats
    return dict(zip(objective.stat_names, sum_over_processes(total, objective).tolist()))
