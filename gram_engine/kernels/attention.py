"""Causal attention within each sequence of a pack: one function with one contract, for training and scoring.

The contract is that of flash attention over packed sequences: bounds say where each sequence's queries and keys lie, and
its queries are its last tokens.  Flash attention neither reads nor writes rows behind the last bound, in the backward pass
either, so that gradients there would be whatever memory held; `packed_attention` therefore never hands over such rows.
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
    """Which keys each query of a pack sees.

    Sequence i has the queries [queries[i], queries[i + 1]) and the keys [keys[i], keys[i + 1]).  Its queries are its last
    tokens: of n queries, number j sees all of the sequence's keys but the last n - 1 - j (a causal mask aligned at the
    bottom right).

    queries, keys: sequences + 1 bounds each, for the host; cu_seqlens_q, cu_seqlens_k: the same, int32, on the device.
    key_rows: int64 [keys[-1]], where the keys lie among the rows that attention is given; None: they are the first ones.
    """

    queries: list[int]
    keys: list[int]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_rows: Tensor | None = None

    @classmethod
    def of_rows(cls, queries: Tensor, keys: Tensor, key_rows: Tensor) -> AttentionBounds:
        """From each sequence's number of queries and of keys, int64 [sequences], and the keys' rows, all on the CPU."""
        queries, keys = (F.pad(lengths.cumsum(0), (1, 0)) for lengths in (queries, keys))
        in_order = torch.equal(key_rows, torch.arange(len(key_rows)))
        bounds = queries.to(torch.int32), keys.to(torch.int32)
        return cls(queries.tolist(), keys.tolist(), *bounds, None if in_order else key_rows)

    @classmethod
    def of_ranges(cls, queries: Tensor, first: Tensor, keys: Tensor, row_of: Tensor | None = None) -> AttentionBounds:
        """Where a sequence's keys are the positions [first, first + keys) of a pack.

        Args:
            queries, first, keys: int64 [sequences] on the CPU; the first and last are numbers of queries and keys.
            row_of: int64 [tokens of the pack], where each position lies among the rows that attention is given; None: they
                are the pack's, in order.
        """
        positions = ranges(first, keys)
        return cls.of_rows(queries, keys, positions if row_of is None else row_of[positions])

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries, and most keys, of one sequence; computed once for all layers."""
        queries, keys = (max(b - a for a, b in zip(part, part[1:])) for part in (self.queries, self.keys))
        return queries, keys

    def to(self, device: torch.device) -> AttentionBounds:
        """The same with its tensors on `device`."""
        return replace(
            self,
            cu_seqlens_q=to_device(self.cu_seqlens_q, device),
            cu_seqlens_k=to_device(self.cu_seqlens_k, device),
            key_rows=None if self.key_rows is None else to_device(self.key_rows, device),
        )


def ranges(first: Tensor, lengths: Tensor) -> Tensor:
    """The numbers of all ranges [first, first + length), one range after the other: int64 [n] twice -> int64 [their sum]."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (first - before).repeat_interleave(lengths)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; a copy to a GPU goes through pinned memory, and the host does not wait for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds) -> Tensor:
    """Attention of each sequence's queries to its keys.

    query [queries, heads, dim]; key and value [rows, groups, dim], of which `bounds` names those that are keys
    -> [queries, heads, dim], the dtype of the query.  On a GPU in half precision it is one call of flash-attn, or of torch's
    flash attention over packed sequences; otherwise scaled_dot_product_attention runs once a sequence.

    Raises:
        ValueError: there are not exactly as many queries as the bounds say.
    """
    if len(query) != bounds.queries[-1]:
        raise ValueError(f"attention was given {len(query)} queries for sequences that have {bounds.queries[-1]}")
    key, value = _select(key, bounds), _select(value, bounds)
    if not len(query):
        return query + key[:0].sum() + value[:0].sum()  # part of the graph: other processes wait for the keys' gradients
    kernel = varlen_kernel(query)
    if kernel is None:
        return _one_by_one(query, key, value, bounds)
    return kernel(query, key, value, bounds.cu_seqlens_q, bounds.cu_seqlens_k, *bounds.longest)


def _select(rows: Tensor, bounds: AttentionBounds) -> Tensor:
    """The keys (or values) alone, in the order of the bounds."""
    if bounds.key_rows is not None:
        return rows.index_select(0, bounds.key_rows)
    return rows if len(rows) == bounds.keys[-1] else rows[: bounds.keys[-1]]


def varlen_kernel(query: Tensor) -> Callable[..., Tensor] | None:
    """Flash attention over packed sequences for such queries: f(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k), causal and aligned at the bottom right; None where there is none for them.
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

    # torch 2.11 takes grouped heads without being told, and does not know the argument.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, window_size=(-1, 0), **grouped)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds) -> Tensor:
    ranges = zip(bounds.queries, bounds.queries[1:], bounds.keys, bounds.keys[1:])
    return torch.cat([_attend(query[a:b], key[c:d], value[c:d]) for a, b, c, d in ranges])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence: [queries, heads, dim], [keys, groups, dim] -> [queries, heads, dim]."""
    asked, seen = len(query), len(key)
    mask = None if asked in (1, seen) else _causal_mask(seen, query.dtype, query.device)[seen - asked : seen, :seen]
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, mask, is_causal=asked == seen > 1, enable_gqa=True)
    return result.squeeze(0).transpose(0, 1)


def _causal_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size or more, the same]: 0 where row i sees column j <= i, else -inf."""
    return _square_mask(1 << (size - 1).bit_length(), dtype, device)


@functools.lru_cache(maxsize=2)
def _square_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept: every sequence of every layer needs a corner of it."""
    return torch.full((size, size), -math.inf, dtype=dtype, device=device).triu_(1)
