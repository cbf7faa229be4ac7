"""Emulation of flash attention's varlen kernel on the CPU, including what the kernel leaves undefined.

Rows that the real kernel does not write are uninitialised; here they are NaN, in the output and in dq, dk and dv.  Arguments
that the kernel refuses raise an error.  Otherwise it is ordinary attention, sequence by sequence, with a causal mask aligned at
the bottom right.  Unlike the kernel it accepts every dtype, so that float32 runs can be compared.
"""

from __future__ import annotations

import math
from unittest import mock

import torch

calls: list[int] = []
"""Rows after the last sequence in each call, queries and keys together; packed_attention promises 0."""


def flash_attention():
    """Context manager: packed_attention uses the emulation on the CPU."""
    from gram_engine.kernels import attention

    calls.clear()
    return mock.patch.object(attention, "varlen_kernel", lambda query: varlen_attention)


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Like flash_attn_varlen_func(..., causal=True)."""
    check(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    calls.append(len(query) - int(cu_seqlens_q[-1]) + len(key) - int(cu_seqlens_k[-1]))
    return _Varlen.apply(query, key, value, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k)


def check(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    """The checks of flash attention, and checks for arguments that would make it read out of bounds."""
    for name, part in (("query", query), ("key", key), ("value", value)):
        _refuse_unless(part.dim() == 3, f"{name} must be [tokens, heads, dim], not {tuple(part.shape)}")
        _refuse_unless(part.stride(-1) == 1, f"{name}: the last dimension must be contiguous, strides {part.stride()}")
        _refuse_unless(part.dtype == query.dtype, f"{name} is {part.dtype}, the query {query.dtype}")
    dim = query.shape[-1]
    _refuse_unless(dim % 8 == 0 and dim <= 256, f"the head dimension must be a multiple of 8 up to 256, not {dim}")
    _refuse_unless(key.shape == value.shape, f"key is {tuple(key.shape)}, value {tuple(value.shape)}")
    _refuse_unless(key.shape[-1] == dim, f"key has dimension {key.shape[-1]}, the query {dim}")
    _refuse_unless(query.shape[1] % key.shape[1] == 0, f"{query.shape[1]} heads, {key.shape[1]} groups")
    _refuse_unless(len(query) > 0 and max_seqlen_q > 0 and max_seqlen_k > 0, "no queries: an empty launch")
    _refuse_unless(len(cu_seqlens_q) == len(cu_seqlens_k), "as many sequences of queries as of keys")
    for name, bounds, rows, longest in (("q", cu_seqlens_q, query, max_seqlen_q), ("k", cu_seqlens_k, key, max_seqlen_k)):
        _refuse_unless(bounds.dtype == torch.int32, f"cu_seqlens_{name} is {bounds.dtype}, not int32")
        _refuse_unless(bounds.is_contiguous() and bounds.dim() == 1, f"cu_seqlens_{name} must be one contiguous row")
        lengths = bounds.diff()
        _refuse_unless(bounds[0] == 0 and (lengths >= 0).all(), f"cu_seqlens_{name} must ascend from 0")
        _refuse_unless(bounds[-1] <= len(rows), f"cu_seqlens_{name} ends at {int(bounds[-1])} of {len(rows)} rows")
        _refuse_unless(lengths.max() <= longest, f"max_seqlen_{name} {longest} is below the longest, {int(lengths.max())}")


def _refuse_unless(holds, message: str) -> None:
    if not holds:
        raise RuntimeError(f"flash attention: {message}")


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, queries, keys, max_q, max_k):
        ctx.save_for_backward(query, key, value)
        ctx.bounds = queries, keys
        output = torch.full(query.shape, math.nan, dtype=query.dtype)
        for a, b, c, d in _sequences(ctx):
            output[a:b] = _attend(query[a:b], key[c:d], value[c:d])
        return output

    @staticmethod
    def backward(ctx, upstream):
        tensors = ctx.saved_tensors
        gradients = [torch.full(tensor.shape, math.nan, dtype=tensor.dtype) for tensor in tensors]
        for a, b, c, d in _sequences(ctx):
            slices = slice(a, b), slice(c, d), slice(c, d)
            parts = [tensor[rows].detach().requires_grad_() for tensor, rows in zip(tensors, slices)]
            with torch.enable_grad():
                found = torch.autograd.grad(_attend(*parts), parts, upstream[a:b])
            for gradient, rows, part in zip(gradients, slices, found):
                gradient[rows] = part
        return *gradients, None, None, None, None


def _sequences(ctx):
    queries, keys = ctx.bounds
    return zip(queries, queries[1:], keys, keys[1:])


def _attend(query, key, value):
    """[queries, heads, dim]; query j of n attends to all keys except the last n - 1 - j."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(key) - len(query) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), value)
