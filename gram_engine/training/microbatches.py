"""From the loader's packs to what this process's stage runs, on the device, and the thread that prepares the next step's."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from gram_engine.data.context_parallel import part_of
from gram_engine.data.loader import GlobalBatch, PackedBatch, PackedLoader
from gram_engine.kernels.attention import AttentionBounds, to_device


def place(batch: GlobalBatch, device: torch.device) -> GlobalBatch:
    """The global batch with micro-batches as this process runs them, on `device`; one that is there already stays as it is.

    On a pipeline all micro-batches get the longest one's length, so that stages know the shape of what they receive without
    asking each time.  With context parallelism they become this process's part.
    """
    if batch.is_placed:
        return batch
    packs = batch.microbatches
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        packs = [_padded(pack, batch.longest) for pack in packs]
    packs = [_with_attention(pack) for pack in packs]
    context, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if context > 1:
        packs = [part_of(pack, rank, context) for pack in packs]
    return replace(batch, microbatches=[_on(device, pack) for pack in packs], is_placed=True)


class Prefetcher:
    """Global batches in the order of training; a thread makes and places the next one while the step before runs.

    Args:
        last: number of samples after which no batch is made in advance.
    """

    def __init__(self, loader: PackedLoader, device: torch.device, last: int):
        self.loader, self.device, self.last = loader, device, last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future] | None = None

    def batch(self, consumed_samples: int) -> GlobalBatch:
        """The placed batch after `consumed_samples` samples; an error in making it is raised here."""
        expected, self._next = self._next, None
        if expected is not None and expected[0] == consumed_samples:
            batch = expected[1].result()
        else:
            batch = self._make(consumed_samples)
        following = consumed_samples + batch.num_samples
        if following < self.last:
            self._next = following, self._thread.submit(self._make, following)
        return batch

    def _make(self, consumed_samples: int) -> GlobalBatch:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        return place(self.loader.batch(consumed_samples), self.device)


def _padded(pack: PackedBatch, length: int) -> PackedBatch:
    """The pack with padding tokens, as a sequence of their own, up to `length`."""
    extra = length - len(pack.tokens)
    if extra == 0:
        return pack
    return replace(
        pack,
        tokens=F.pad(pack.tokens, (0, extra)),
        position_ids=torch.cat([pack.position_ids, torch.arange(extra)]),
        cu_seqlens=torch.cat([pack.cu_seqlens, pack.cu_seqlens.new_tensor([length])]),
        max_seqlen=max(pack.max_seqlen, extra),
    )


def _with_attention(pack: PackedBatch) -> PackedBatch:
    """The pack with each token's keys, and each label row's: its sequence, which ends with it."""
    starts, lengths, rows = pack.cu_seqlens[:-1].long(), pack.cu_seqlens.diff().long(), pack.rows
    attention = AttentionBounds.of_ranges(lengths, starts, lengths)
    if len(pack.targets):
        return replace(pack, attention=attention)
    starts = starts[: len(rows)]  # rows are in the order of sequences, padding comes last
    return replace(
        pack, attention=attention, label_attention=AttentionBounds.of_ranges(torch.ones_like(rows), starts, rows + 1 - starts)
    )


def _on(device: torch.device, pack: PackedBatch) -> PackedBatch:
    moved = {name: to_device(value, device) for name, value in vars(pack).items() if isinstance(value, torch.Tensor)}
    bounds = {name: value.to(device) for name, value in vars(pack).items() if isinstance(value, AttentionBounds)}
    return replace(pack, **moved, **bounds)
