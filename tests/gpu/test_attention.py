"""Packed attention by flash kernels against float64 attention on the CPU."""

import pytest
import torch

from gram_engine.kernels.attention import AttentionBounds, packed_attention

CASES = {
    "causal": ([5, 128, 1, 566], [range(0, 5), range(5, 133), range(133, 134), range(134, 700)]),
    "label rows, and padding behind": ([1, 1, 1], [range(0, 5), range(5, 133), range(133, 690)]),
    "tails of a shared beginning": ([300, 140, 260], [range(0, 300), range(0, 440), [*range(0, 300), *range(440, 700)]]),
}
ROWS = 700


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64_attention(dtype, tolerance, case):
    queries, keys = CASES[case]
    key_rows = torch.tensor([row for rows in keys for row in rows])
    bounds = AttentionBounds.of_rows(torch.tensor(queries), torch.tensor([len(rows) for rows in keys]), key_rows)
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(queries), 8, 64), (ROWS, 2, 64), (ROWS, 2, 64)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)
    results = []
    for device, wide in (("cuda", dtype), ("cpu", torch.float64)):
        parts = [tensor.to(device, wide).requires_grad_() for tensor in tensors]
        out = packed_attention(*parts, bounds.to(torch.device(device)))
        results.append([out, *torch.autograd.grad(out, parts, upstream.to(device, wide))])
    for found, wanted in zip(*results):
        scale = wanted.abs().max().item()
        assert (found.cpu().double() - wanted).abs().max().item() < tolerance * scale
