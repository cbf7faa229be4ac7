"""Context parallelism: which tokens of a pack each process holds.

Every sequence is cut into 2 x size chunks of equal length; process r holds chunks r and 2 x size - 1 - r, so that all have
the same share of causal attention.  It is the order of Megatron and Transformer Engine.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gram_engine.data.loader import PackedBatch


def held_positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Positions in the pack that process `rank` holds, in its order, int64 [tokens / size].

    Args:
        cu_seqlens: int32 [sequences + 1]; each length is a multiple of 2 x size.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    chunk = lengths // (2 * size)
    first = torch.stack([starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk], dim=1).flatten()
    return ranges(first, chunk.repeat_interleave(2))


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers of all ranges [start, start + length), one range after the other, int64."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def part_of(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """What process `rank` of `size` holds of a pack: its tokens and predicting rows, and in stage 2 the samples of these.

    `cu_seqlens` and `max_seqlen` stay the whole pack's, as Megatron and Transformer Engine want them.
    """
    held = [held_positions(batch.cu_seqlens, each, size) for each in range(size)]
    total = len(batch.tokens)
    gather_order = torch.empty(total, dtype=torch.int64).index_copy_(0, torch.cat(held), torch.arange(total))
    place = gather_order - rank * (total // size)
    rows = place[batch.rows]
    here = (rows >= 0) & (rows < total // size)
    part = replace(
        batch,
        tokens=batch.tokens[held[rank]],
        position_ids=batch.position_ids[held[rank]],
        rows=rows[here],
        gather_order=gather_order,
    )
    if len(batch.targets):
        return replace(part, targets=batch.targets[here])
    of_samples = {name: getattr(batch, name)[here] for name in ("sample_ids", "preference", "weight", "margin")}
    starts = batch.cu_seqlens[: len(here)].long()[here]  # rows are in the order of sequences, padding comes last
    return replace(part, **of_samples, **_label_keys(starts, batch.rows[here], gather_order))


def _label_keys(starts: Tensor, rows: Tensor, gather_order: Tensor) -> dict[str, Tensor]:
    """Where the keys that the label rows see lie: from the start of their sequence to themselves."""
    lengths = rows + 1 - starts
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return {"label_keys": gather_order[ranges(starts, lengths)], "label_cu_seqlens": bounds.to(torch.int32)}
