"""Packed attention by flash kernels against float64 attention, one sequence after the other."""

import pytest
import torch
import torch.nn.functional as F

from gram_engine.model.attention import packed_attention


def expected(query, key, value, bounds_q, bounds_kv, causal):
    outputs = []
    for start, end, first, last in zip(bounds_q, bounds_q[1:], bounds_kv, bounds_kv[1:]):
        q, k, v = (part.double().transpose(0, 1) for part in (query[start:end], key[first:last], value[first:last]))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "label rows"])
def test_equals_float64_attention(dtype, tolerance, causal):
    generator = torch.Generator("cuda").manual_seed(0)
    keys = [0, 5, 133, 134, 700]
    queries = keys if causal else list(range(len(keys)))
    make = dict(device="cuda", dtype=dtype, generator=generator)
    shapes = [(queries[-1], 8, 64), (keys[-1], 2, 64), (keys[-1], 2, 64)]
    tensors = [torch.randn(shape, **make) for shape in shapes]
    upstream = torch.randn(queries[-1], 8, 64, **make)
    results = []
    for ours in (True, False):
        query, key, value = (tensor.clone().requires_grad_() for tensor in tensors)
        if ours:
            bounds = [torch.tensor(part, dtype=torch.int32, device="cuda") for part in (queries, keys)]
            longest = max(b - a for a, b in zip(queries, queries[1:]))
            out = packed_attention(query, key, value, *bounds, longest, 566, causal)
        else:
            out = expected(query, key, value, queries, keys, causal)
        out.backward(upstream.to(out.dtype))
        results.append([out, query.grad, key.grad, value.grad])
    for found, wanted in zip(*results):
        scale = wanted.abs().max().item()
        assert (found.double() - wanted.double()).abs().max().item() < tolerance * scale
