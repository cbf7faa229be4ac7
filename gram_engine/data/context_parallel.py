"""Context parallelism: which tokens of a pack each process holds, and where the keys for them are.

Every sequence is cut into 2 x size chunks of equal length; process r holds chunks r and 2 x size - 1 - r, so that all have
the same share of causal attention.  Megatron and Transformer Engine use the same order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gram_engine.data.loader import PackedBatch
from gram_engine.kernels.attention import AttentionBounds, ranges


def held_positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Positions in the pack of the tokens that process `rank` holds, in its order, int64 [tokens / size].

    Args:
        cu_seqlens: int32 [sequences + 1]; each sequence's length is a multiple of 2 x size.
    """
    _, first, chunk = _chunks(cu_seqlens, rank, size)
    return ranges(first, chunk)


def part_of(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """The part of a pack that process `rank` of `size` holds: its tokens, its rows and, for label rows, their samples.

    `cu_seqlens` and `max_seqlen` remain those of the whole pack, as Megatron and Transformer Engine expect.  The keys in
    `attention` and `label_attention` are positions in the concatenation of all processes' tokens, in the order of ranks.
    """
    held = [held_positions(batch.cu_seqlens, each, size) for each in range(size)]
    total = len(batch.tokens)
    gathered_at = torch.empty(total, dtype=torch.int64).index_copy_(0, torch.cat(held), torch.arange(total))
    rows = gathered_at[batch.rows] - rank * (total // size)
    here = (rows >= 0) & (rows < total // size)
    part = replace(
        batch,
        tokens=batch.tokens[held[rank]],
        position_ids=batch.position_ids[held[rank]],
        rows=rows[here],
        attention=_chunk_attention(batch.cu_seqlens, rank, size, gathered_at),
        label_attention=None if batch.label_attention is None else _label_attention(batch, here, gathered_at),
    )
    if len(batch.targets):
        return replace(part, targets=batch.targets[here])
    of_samples = {name: getattr(batch, name)[here] for name in ("sample_ids", "preference", "weight", "margin")}
    return replace(part, **of_samples)


def _chunk_attention(cu_seqlens: Tensor, rank: int, size: int, gathered_at: Tensor) -> AttentionBounds:
    """Bounds for a process's two chunks of each sequence: a chunk sees its sequence up to the chunk's end."""
    starts, first, chunk = _chunks(cu_seqlens, rank, size)
    return AttentionBounds.of_ranges(chunk, starts, first + chunk - starts, gathered_at)


def _label_attention(batch: PackedBatch, here: Tensor, gathered_at: Tensor) -> AttentionBounds:
    """Bounds for the label rows that this process holds (`here`, bool [rows of the pack]): sequence start to the row itself."""
    starts, rows = batch.cu_seqlens[: len(here)].long()[here], batch.rows[here]
    return AttentionBounds.of_ranges(torch.ones_like(rows), starts, rows + 1 - starts, gathered_at)


def _chunks(cu_seqlens: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A process's chunks, two of each sequence, int64 [2 x sequences]: starts of their sequences, their starts and lengths."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    chunk = lengths // (2 * size)
    first = torch.stack([starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk], dim=1).flatten()
    return starts.repeat_interleave(2), first, chunk.repeat_interleave(2)
