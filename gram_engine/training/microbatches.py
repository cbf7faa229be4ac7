"""From the loader's packs to the micro-batches of this process on its device, and the thread that prepares the next step's."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from gram_engine.data.context_parallel import part_of
from gram_engine.data.loader import GlobalBatch, PackedBatch, PackedLoader
from gram_engine.kernels.attention import AttentionBounds, to_device
from gram_engine.platform.device import Platform


def place(batch: GlobalBatch, device: torch.device) -> GlobalBatch:
    """The global batch with micro-batches as this process runs them, on `device`; returned unchanged if it is placed already.

    With pipeline parallelism all micro-batches are padded to the length of the longest, so that stages know the shape of what
    they receive without asking each time.  With context parallelism each is cut to this process's part.
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
    """Global batches in the order of training; a thread prepares the next one while the current step runs.

    Args:
        train_samples: number of samples of the whole run, after which no batch is prepared in advance.
    """

    def __init__(self, loader: PackedLoader, platform: Platform, train_samples: int):
        self.loader, self.platform, self.train_samples = loader, platform, train_samples
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future] | None = None

    def batch(self, consumed_samples: int) -> GlobalBatch:
        """The placed batch that starts after `consumed_samples` samples; an error of the thread is raised here."""
        expected, self._next = self._next, None
        if expected is not None and expected[0] == consumed_samples:
            batch = expected[1].result()
        else:
            batch = self._make(consumed_samples)
        following = consumed_samples + batch.num_samples
        if following < self.train_samples:
            self._next = following, self._thread.submit(self._make, following)
        return batch

    def _make(self, consumed_samples: int) -> GlobalBatch:
        self.platform.use_in_this_thread()
        return place(self.loader.batch(consumed_samples), self.platform.device)


def _padded(pack: PackedBatch, length: int) -> PackedBatch:
    """The pack, padded to `length` tokens; the padding is a sequence of its own."""
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
    """The pack with the keys that each token, and each label row (the last token of its sequence), attends to."""
    starts, lengths, rows = pack.cu_seqlens[:-1].long(), pack.cu_seqlens.diff().long(), pack.rows
    attention = AttentionBounds.of_ranges(lengths, starts, lengths)
    if len(pack.targets):
        return replace(pack, attention=attention)
    starts = starts[: len(rows)]  # rows are in the order of the sequences, and padding is last
    return replace(
        pack, attention=attention, label_attention=AttentionBounds.of_ranges(torch.ones_like(rows), starts, rows + 1 - starts)
    )


def _on(device: torch.device, pack: PackedBatch) -> PackedBatch:
    moved = {name: to_device(value, device) for name, value in vars(pack).items() if isinstance(value, torch.Tensor)}
    bounds = {name: value.to(device) for name, value in vars(pack).items() if isinstance(value, AttentionBounds)}
    return replace(pack, **moved, **bounds)
