"""Attention within each sequence of a pack where Transformer Engine's is not used, also over context-parallel processes."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclass
class PackSequences(PackedSeqParams):
    """A pack's sequences, where label rows lie, and how context-parallel processes share the pack.

    label_rows: [labels] int64 places among this process's tokens; label_positions: [labels] int64 positions in their
    sequences; label_cu_seqlens: int32 [labels + 1] bounds of the labelled sequences' keys.  With context parallelism
    (data/context_parallel.py): gather_order [tokens of the pack], label_keys [keys], places in what all processes hold.
    """

    label_rows: Tensor | None = None
    label_positions: Tensor | None = None
    label_cu_seqlens: Tensor | None = None
    gather_order: Tensor | None = None
    label_keys: Tensor | None = None


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack.

    query [tokens, heads, dim], key and value [tokens, groups, dim] (thd) -> [tokens, heads * dim], dtype of the query.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_):
        super().__init__(config=config)
        self.cp_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, packed_seq_params: PackSequences, **_
    ) -> Tensor:
        sequences = packed_seq_params
        bounds, longest = sequences.cu_seqlens_kv, sequences.max_seqlen_kv
        if getattr(sequences, "gather_order", None) is None:
            return packed_attention(query, key, value, bounds, bounds, longest, longest, causal=True).flatten(1)
        key, value = (gather_keys(part, sequences.gather_order, self.cp_group) for part in (key, value))
        return _held_chunks_attention(query, key, value, bounds.tolist(), self.cp_group).flatten(1)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_q: int,
    max_kv: int,
    causal: bool,
) -> Tensor:
    """Attention of each sequence's queries to its keys; causal (as many queries as keys), or every query sees all.

    query [queries, heads, dim], key and value [keys, groups, dim] -> [queries, heads, dim].  On a GPU in half precision by
    flash-attn, else torch's flash attention for packed sequences; otherwise by scaled_dot_product_attention, one by one.
    """
    if not len(query):
        return query + key[:0].sum() + value[:0].sum()  # part of the graph: other processes wait for the keys' gradients
    varlen = _varlen_kernel() if query.is_cuda and query.dtype in HALF else None
    if varlen is not None:
        return varlen(query, key, value, cu_seqlens_q, cu_seqlens_kv, max_q, max_kv, causal)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
    outputs = [
        _attend(query[start:end], key[first:last], value[first:last], is_causal=causal)
        for start, end, first, last in zip(queries, queries[1:], keys, keys[1:])
    ]
    return torch.cat(outputs)


@functools.cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """Flash attention over packed sequences, by the best package here; arguments as of packed_attention."""
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        deterministic = torch.are_deterministic_algorithms_enabled()
        return lambda *args: flash_attn_varlen_func(*args[:7], causal=args[7], deterministic=deterministic)
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        return lambda *args: varlen_attn(*args[:7], window_size=(-1, 0) if args[7] else (-1, -1), enable_gqa=True)
    return None


def _attend(query: Tensor, key: Tensor, value: Tensor, **mask) -> Tensor:
    """One sequence by scaled_dot_product_attention: [queries, heads, dim], [keys, groups, dim] -> [queries, heads, dim]."""
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).squeeze(0).transpose(0, 1)


def gather_keys(part: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows that context-parallel processes hold, those that `order` names: [tokens / size, ...] -> [len(order), ...].

    The backward pass sums each process's gradients and hands it those of its own rows.
    """
    return gather_from_sequence_parallel_region(part, group=group).index_select(0, order)


def _held_chunks_attention(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], group: dist.ProcessGroup) -> Tensor:
    """Causal attention of this process's two chunks of each sequence to the sequences' whole keys, which lie in order."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    outputs, at = [], 0
    for first, last in zip(bounds, bounds[1:]):
        chunk = (last - first) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            seen = (number + 1) * chunk
            mask = torch.ones(chunk, seen, dtype=torch.bool, device=query.device).tril(seen - chunk)
            here = slice(first, first + seen)
            outputs.append(_attend(query[at : at + chunk], key[here], value[here], attn_mask=mask))
            at += chunk
    return torch.cat(outputs)
