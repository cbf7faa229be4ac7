"""The pruned last layer: stage 2 reads hidden states at the label rows only, so the last layer computes only those.

In the last layer every position contributes a key and a value, but only the label rows have a query: query projection,
attention output, output projection, MLP and final norm are computed for the label rows alone.  This is exact.  No earlier
layer can be pruned, because the next layer computes keys and values from its output at every position.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Callable, ContextManager

import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from gram_engine.kernels.attention import packed_attention
from gram_engine.model.attention import PackSequences, gather_keys, rotate_heads
from gram_engine.model.layers import RMSNorm, wait_for_parameters
from gram_engine.model.lora import adapter_of


class DeferredRMSNorm(RMSNorm):
    """The final norm if the head applies it to the label rows (kernels/pair_loss.py): it only holds the weight [hidden]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class LabelRowLayer(TransformerLayer):
    """A transformer layer that returns the label rows only: [tokens, 1, hidden] -> [labels, 1, hidden], same dtype.

    Its input is [tokens / TP, 1, hidden] under sequence parallelism.  Its modules and checkpoint keys are those of the other
    layers, local or Transformer Engine's; for attention it uses the weights of the modules without calling them.

    The output is replicated on all tensor-parallel processes, under sequence parallelism as well: each residual row is added
    by the process that holds it, in the all-reduce of the attention output.  Everything after attention therefore runs
    without sequence parallelism, and the gradient of the norm before the MLP is complete on every process.

    Args:
        without_fp8: function that returns a context manager, `without_fp8(building=)`; the few label rows do not have the
            sizes that FP8 matrix products need.
    """

    def __init__(self, config, submodules, without_fp8: Callable[..., ContextManager], **kwargs):
        self.sequence_parallel = config.sequence_parallel
        self.without_fp8 = without_fp8
        whole_rows = copy.copy(config)
        whole_rows.sequence_parallel = whole_rows.tp_comm_overlap = False
        with without_fp8(building=True):
            super().__init__(whole_rows, submodules, **kwargs)
        self._norm_weight().sequence_parallel = self.sequence_parallel
        if adapter := adapter_of(self.self_attention.linear_qkv):
            adapter.set_sequence_parallel(self.sequence_parallel)

    def _norm_weight(self) -> Tensor:
        """The input norm's weight; Transformer Engine's layer has it in the QKV projection."""
        fused = getattr(self.self_attention.linear_qkv, "layer_norm_weight", None)
        return self.input_layernorm.weight if fused is None else fused

    def forward(self, hidden_states: Tensor, *, packed_seq_params: PackSequences, **_) -> tuple[Tensor, None]:
        sequences, attention = packed_seq_params, self.self_attention
        rows = sequences.label_rows
        wait_for_parameters(self.input_layernorm, attention.linear_qkv, attention.linear_proj)
        normed = F.rms_norm(hidden_states, hidden_states.shape[-1:], self._norm_weight(), self.config.layernorm_epsilon)
        adapter = adapter_of(attention.linear_qkv)
        update = None if adapter is None else adapter(normed)
        if self.sequence_parallel:
            normed = gather_from_sequence_parallel_region(normed, group=self.tp_group)
        else:
            normed = copy_to_tensor_model_parallel_region(normed, group=self.tp_group)
        query, key, value = self._query_key_value(normed, update, rows)
        query = rotate_heads(query, sequences.cos[rows], sequences.sin[rows])
        key = rotate_heads(key, sequences.cos, sequences.sin)
        key, value = (gather_keys(part, attention.pg_collection.cp) for part in (key, value))
        attended = packed_attention(query, key, value, sequences.label_attention)
        attended = attended.flatten(1).unsqueeze(1)
        part = F.linear(attended, attention.linear_proj.weight)
        if self.sequence_parallel:
            part = part + self._residual_part(hidden_states, rows)
            hidden = reduce_from_tensor_model_parallel_region(part, group=self.tp_group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(part, group=self.tp_group) + hidden_states[rows]
        if adapter := adapter_of(attention.linear_proj):
            hidden = hidden + adapter(attended)
        with self.without_fp8():
            return self._mlp(hidden), None

    def _mlp(self, hidden: Tensor) -> Tensor:
        """The MLP of the label rows; without label rows it gets one row of zeros, because fused kernels refuse empty inputs."""
        labels = len(hidden)
        return self._forward_mlp(hidden if labels else F.pad(hidden, (0, 0, 0, 0, 0, 1)))[:labels]

    def _query_key_value(self, normed: Tensor, update: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """normed [tokens, 1, hidden] -> query [labels, heads, dim], key and value [tokens, groups, dim].

        Megatron stores the rows of the weight group by group: the queries of the group, its key, its value.  `update`
        [tokens, 1, rows of the weight] is added to the projections; it is the output of an adapter.
        """
        attention = self.self_attention
        groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        weight = attention.linear_qkv.weight.view(groups, -1, dim, normed.shape[-1])
        normed = normed.squeeze(1)
        query = F.linear(normed[rows], weight[:, :-2].flatten(0, 2)).unflatten(-1, (-1, dim))
        key, value = F.linear(normed, weight[:, -2:].flatten(0, 2)).unflatten(-1, (groups, 2, dim)).unbind(2)
        if update is not None:
            update = update.view(len(normed), groups, -1, dim)
            query = query + update[rows, :, :-2].flatten(1, 2)
            key, value = key + update[:, :, -2], value + update[:, :, -1]
        if attention.config.qk_layernorm:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        return query, key, value

    def _residual_part(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """[labels, 1, hidden]: the label rows in this process's slice of the sequence, zeros for the others."""
        local = rows - self.tp_group.rank() * len(hidden_states)
        owned = (local >= 0) & (local < len(hidden_states))
        return hidden_states[local.clamp(0, len(hidden_states) - 1)] * owned[:, None, None].to(hidden_states.dtype)


def label_row_layer_spec(layer_spec: ModuleSpec, without_fp8: Callable[..., ContextManager]) -> ModuleSpec:
    """The specification of a layer, with LabelRowLayer as its module."""
    return replace(layer_spec, module=LabelRowLayer, params={**layer_spec.params, "without_fp8": without_fp8})
