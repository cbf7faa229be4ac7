"""Layers for machines without Transformer Engine: megatron-core's local layers with our RMSNorm and packed attention.

megatron-core's own local norm (WrappedTorchNorm) does not support sequence parallelism, and its local attention
(DotProductAttention) does not support packed sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gram_engine.model.attention import PackedAttention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm: [..., hidden] -> same shape and dtype, statistics in fp32.

    With sequence parallelism each tensor-parallel process sees only its slice of the sequence; the weight is then marked
    `sequence_parallel`, so that megatron-core sums its gradient over these processes.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


def wait_for_parameters(*modules: torch.nn.Module) -> None:
    """Run the forward pre-hooks of modules whose weights are used without calling the module.

    DDP's hooks wait for the all-gather of the parameters (--overlap-param-gather).
    """
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            hook(module, ())


def local_layer_spec(qk_layernorm: bool = False) -> ModuleSpec:
    """megatron-core's local layer with our norm and attention; the checkpoint keys are those of Transformer Engine's layer."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
