"""packed_attention against naive attention in float64: whole sequences, shared prefixes, rows that are not keys."""

import contextlib
import math

import pytest
import torch

from gram_engine.kernels.attention import AttentionBounds, packed_attention
from tests.support import flash_emulation

HEADS, GROUPS, DIM = 4, 2, 8
CASES = {
    # number of queries per sequence, key rows per sequence, number of rows
    "whole sequences": ([3, 1, 7], [range(0, 3), range(3, 4), range(4, 11)], 11),
    "label rows, then padding": ([1, 1], [range(0, 5), range(5, 7)], 12),
    "shared prefix": ([6, 3, 1], [range(0, 6), range(0, 9), [*range(0, 6), 9]], 10),
    "chunks of a context-parallel process": ([2, 2, 3, 3], [[0, 1], [0, 1, 4, 5, 6, 7, 2, 3], range(8, 11), range(8, 20)], 20),
    "a sequence without queries": ([2, 0, 1], [range(0, 2), range(2, 4), range(4, 6)], 6),
}


def bounds_of(queries, keys):
    key_rows = [row for rows in keys for row in rows]
    numbers = (torch.tensor(part, dtype=torch.int64) for part in (queries, [len(rows) for rows in keys], key_rows))
    return AttentionBounds.of_rows(*numbers)


def naive_attention(query, key, value, queries, keys):
    """One query and one head at a time."""
    outputs, position = [], 0
    for count, rows in zip(queries, keys):
        rows = list(rows)
        for number in range(count):
            visible = rows[: len(rows) - (count - 1 - number)]
            for head in range(HEADS):
                group = head * GROUPS // HEADS
                scores = key[visible, group] @ query[position, head] / math.sqrt(DIM)
                outputs.append(scores.softmax(0) @ value[visible, group])
            position += 1
    return torch.stack(outputs).view(-1, HEADS, DIM)


@pytest.mark.parametrize("kernel", ["sequence by sequence", "flash contract"])
@pytest.mark.parametrize("case", CASES)
def test_equals_naive_attention(case, kernel):
    queries, keys, rows = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(queries), HEADS, DIM), (rows, GROUPS, DIM), (rows, GROUPS, DIM)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64, generator=generator)
    results = []
    for ours in (True, False):
        parts = [tensor.clone().requires_grad_() for tensor in tensors]
        with flash_emulation.flash_attention() if kernel == "flash contract" else contextlib.nullcontext():
            out = packed_attention(*parts, bounds_of(queries, keys)) if ours else naive_attention(*parts, queries, keys)
        results.append([out, *torch.autograd.grad(out, parts, upstream)])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_rows_after_the_last_sequence_get_no_gradient():
    """Not even if they hold NaN, as uninitialised memory may."""
    key = torch.randn(9, GROUPS, DIM)
    key[7:] = math.nan
    parts = [torch.randn(2, HEADS, DIM), key, key.clone()]
    parts = [part.requires_grad_() for part in parts]
    with flash_emulation.flash_attention():
        out = packed_attention(*parts, bounds_of([1, 1], [range(0, 5), range(5, 7)]))
    gradients = torch.autograd.grad(out.sum(), parts)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][7:].any() and not gradients[2][7:].any()


def test_the_emulation_fails_where_the_kernel_fails():
    """Rows after the last sequence get NaN gradients, and invalid arguments are refused."""
    query, key = torch.randn(2, HEADS, DIM, requires_grad=True), torch.randn(9, GROUPS, DIM, requires_grad=True)
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 5, 7], dtype=torch.int32)
    out = flash_emulation.varlen_attention(query, key, key, *bounds, 1, 5)
    assert torch.autograd.grad(out.sum(), key)[0][7:].isnan().all()
    refused = {
        "int32": (query, key, key, bounds[0].long(), bounds[1], 1, 5),
        "below the longest": (query, key, key, *bounds, 1, 4),
        "ends at 7 of 6 rows": (query, key[:6], key[:6], *bounds, 1, 5),
        "empty launch": (query[:0], key, key, *bounds, 1, 5),
        "multiple of 8": (query[..., :6], key[..., :6], key[..., :6], *bounds, 1, 5),
        "must be contiguous": (query, key.transpose(1, 2).contiguous().transpose(1, 2), key, *bounds, 1, 5),
    }
    for message, arguments in refused.items():
        with pytest.raises(RuntimeError, match=message):
            flash_emulation.varlen_attention(*arguments)


def test_no_queries_stay_in_the_graph():
    key = torch.randn(4, GROUPS, DIM, requires_grad=True)
    out = packed_attention(torch.randn(0, HEADS, DIM), key, key, bounds_of([], []))
    assert out.shape == (0, HEADS, DIM)
    assert not torch.autograd.grad(out.sum(), key)[0].any()


def test_a_wrong_number_of_queries_is_refused():
    key = torch.randn(4, GROUPS, DIM)
    with pytest.raises(ValueError, match="3 queries for sequences that have 4"):
        packed_attention(torch.randn(3, HEADS, DIM), key, key, bounds_of([4], [range(4)]))
