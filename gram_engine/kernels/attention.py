"""Causal attention within each sequence of a pack, for training and scoring: `packed_attention`.

It follows the contract of flash attention over packed sequences: cumulative lengths say where each sequence's queries and
keys are, and the queries are the last tokens of their sequence.  Flash attention neither reads nor writes the rows after the
last sequence, and its backward pass leaves their gradients uninitialised; `packed_attention` therefore never passes such
rows to it.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from dataclasses import dataclass, replace
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionBounds:
    """Which keys each query of a pack attends to.

    Sequence i has the queries [queries[i], queries[i + 1]) and the keys [keys[i], keys[i + 1]).  Its queries are its last
    tokens: query j of n attends to all keys of the sequence except the last n - 1 - j (a causal mask aligned at the bottom
    right).

    Attributes:
        queries, keys: cumulative lengths, sequences + 1 numbers each, as Python lists for the host.
        cu_seqlens_q, cu_seqlens_k: the same as int32 [sequences + 1] tensors on the device.
        key_rows: int64 [keys[-1]], the row of each key in the `key` and `value` tensors; None: the first keys[-1] rows.
    """

    queries: list[int]
    keys: list[int]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_rows: Tensor | None = None

    @classmethod
    def of_rows(cls, queries: Tensor, keys: Tensor, key_rows: Tensor) -> AttentionBounds:
        """From the lengths of each sequence's queries and keys, int64 [sequences], and `key_rows`; all on the CPU."""
        queries, keys = (F.pad(lengths.cumsum(0), (1, 0)) for lengths in (queries, keys))
        in_order = torch.equal(key_rows, torch.arange(len(key_rows)))
        bounds = queries.to(torch.int32), keys.to(torch.int32)
        return cls(queries.tolist(), keys.tolist(), *bounds, None if in_order else key_rows)

    @classmethod
    def of_ranges(cls, queries: Tensor, first: Tensor, keys: Tensor, row_of: Tensor | None = None) -> AttentionBounds:
        """For sequences whose keys are the positions [first, first + keys) of a pack.

        Args:
            queries, keys: int64 [sequences] on the CPU, the lengths of each sequence's queries and keys.
            first: int64 [sequences] on the CPU, the position of each sequence's first key.
            row_of: int64 [tokens of the pack], the row of each position in the `key` and `value` tensors; None: the rows
                are the positions.
        """
        positions = ranges(first, keys)
        return cls.of_rows(queries, keys, positions if row_of is None else row_of[positions])

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """(largest number of queries, largest number of keys) of a sequence; computed once for all layers."""
        queries, keys = (max(b - a for a, b in zip(part, part[1:])) for part in (self.queries, self.keys))
        return queries, keys

    def to(self, device: torch.device) -> AttentionBounds:
        """A copy with its tensors on `device`."""
        return replace(
            self,
            cu_seqlens_q=to_device(self.cu_seqlens_q, device),
            cu_seqlens_k=to_device(self.cu_seqlens_k, device),
            key_rows=None if self.key_rows is None else to_device(self.key_rows, device),
        )


def ranges(first: Tensor, lengths: Tensor) -> Tensor:
    """Concatenation of the ranges [first, first + length): int64 [n] and int64 [n] -> int64 [sum of lengths]."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (first - before).repeat_interleave(lengths)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`.  A copy to a GPU goes through pinned memory, and the host does not wait for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds) -> Tensor:
    """Causal attention of each sequence's queries to its keys.

    On a GPU in half precision this is one call of flash-attn, or of torch's flash attention over packed sequences; otherwise
    scaled_dot_product_attention is called once per sequence.

    Args:
        query: [queries, heads, dim].
        key, value: [rows, groups, dim], same dtype as `query`; `bounds` selects the rows that are keys.

    Returns:
        [queries, heads, dim], dtype of `query`.

    Raises:
        ValueError: the number of queries is not the one in `bounds`.
    """
    if len(query) != bounds.queries[-1]:
        raise ValueError(f"attention was given {len(query)} queries for sequences that have {bounds.queries[-1]}")
    key, value = _select(key, bounds), _select(value, bounds)
    if not len(query):
        # Keeps key and value in the graph: other processes wait for their gradients in a collective.
        return query + key[:0].sum() + value[:0].sum()
    kernel = varlen_kernel(query)
    if kernel is None:
        return _one_by_one(query, key, value, bounds)
    return kernel(query, key, value, bounds.cu_seqlens_q, bounds.cu_seqlens_k, *bounds.longest)


def _select(rows: Tensor, bounds: AttentionBounds) -> Tensor:
    """The rows that are keys (or values), in the order of the bounds."""
    if bounds.key_rows is not None:
        return rows.index_select(0, bounds.key_rows)
    return rows if len(rows) == bounds.keys[-1] else rows[: bounds.keys[-1]]


def varlen_kernel(query: Tensor) -> Callable[..., Tensor] | None:
    """Flash attention over packed sequences for this device, dtype and head size, or None if there is none.

    The arguments are (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k); the mask is causal and
    aligned at the bottom right.
    """
    dim = query.shape[-1]
    if not query.is_cuda or query.dtype not in HALF or dim % 8 or dim > 256:
        return None
    return _flash_attn() or _torch_varlen()


@functools.cache
def _flash_attn() -> Callable[..., Tensor] | None:
    if not importlib.util.find_spec("flash_attn"):
        return None
    from flash_attn import flash_attn_varlen_func

    def kernel(*arguments) -> Tensor:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(*arguments, causal=True, deterministic=deterministic)

    return kernel


@functools.cache
def _torch_varlen() -> Callable[..., Tensor] | None:
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        return None
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 supports grouped heads without this argument, and does not accept it.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, window_size=(-1, 0), **grouped)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds) -> Tensor:
    ranges = zip(bounds.queries, bounds.queries[1:], bounds.keys, bounds.keys[1:])
    return torch.cat([_attend(query[a:b], key[c:d], value[c:d]) for a, b, c, d in ranges])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence: [queries, heads, dim], [keys, groups, dim] -> [queries, heads, dim]."""
    queries, keys = len(query), len(key)
    mask = None if queries in (1, keys) else _causal_mask(keys, query.dtype, query.device)[keys - queries : keys, :keys]
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, mask, is_causal=queries == keys > 1, enable_gqa=True)
    return result.squeeze(0).transpose(0, 1)


def _causal_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Square, at least [size, size]: 0 where column j <= row i, else -inf.  The size is rounded up to a power of two."""
    return _square_mask(1 << (size - 1).bit_length(), dtype, device)


@functools.lru_cache(maxsize=2)
def _square_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cached, because every sequence of every layer needs a part of it."""
    return torch.full((size, size), -math.inf, dtype=dtype, device=device).triu_(1)
