"""Layers for machines without Transformer Engine: RMSNorm under sequence parallelism and packed causal attention.

megatron-core's own local layers refuse both (WrappedTorchNorm has no sequence parallelism, DotProductAttention no packed
sequences); everything else of its local layer specification is used as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm. [..., hidden] -> same shape and dtype; statistics in fp32.

    The weight is marked `sequence_parallel`, so that megatron-core sums its gradient over the tensor-parallel processes,
    each of which sees only its part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class PackedAttention(MegatronModule):
    """Attention within each sequence of a pack, by torch's scaled_dot_product_attention.

    query [queries, heads, dim], key and value [tokens, groups, dim] (thd) -> [queries, heads * dim], dtype of the query.
    Causal, with as many queries as keys; or attn_mask_type=no_mask, with any number of queries that see the whole sequence.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_):
        super().__init__(config=config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **_,
    ) -> Tensor:
        causal = attn_mask_type != AttnMaskType.no_mask
        queries, keys = packed_seq_params.cu_seqlens_q.tolist(), packed_seq_params.cu_seqlens_kv.tolist()
        outputs = [query[:0]]
        for start, end, first, last in zip(queries, queries[1:], keys, keys[1:]):
            q = query[start:end].transpose(0, 1).unsqueeze(0)
            k, v = (part[first:last].transpose(0, 1).unsqueeze(0) for part in (key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            outputs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outputs).flatten(1)


def local_layer_spec(qk_layernorm: bool = False) -> ModuleSpec:
    """megatron-core's local layer with our norm and attention; checkpoint keys equal Transformer Engine's."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
