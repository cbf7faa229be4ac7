"""Stage 2 needs hidden states at the label rows only: the last layer computes just those, and the head norms them.

In the last layer every position gives a key and a value, but only label rows ask: query, attention output, output
projection, MLP and final norm are computed for label rows alone.  This is exact.  No earlier layer can be cut: its output
at every position feeds the keys and values of the next.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from gram_engine.model.layers import RMSNorm, local_layer_spec


@dataclass
class LabelledSequences(PackedSeqParams):
    """A pack's sequences, the first `len(label_rows)` of which end in a label row.

    label_rows: [labels] int64 positions in the pack; label_positions: [labels] int64 positions in their sequences.
    """

    label_rows: Tensor | None = None
    label_positions: Tensor | None = None

    def of_labels(self) -> PackedSeqParams:
        """One query, the label row, against each labelled sequence's keys."""
        labels = len(self.label_rows)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=torch.arange(labels + 1, dtype=torch.int32, device=self.label_rows.device),
            cu_seqlens_kv=self.cu_seqlens_kv[: labels + 1],
            max_seqlen_q=1,
            max_seqlen_kv=self.max_seqlen_kv,
        )


class DeferredRMSNorm(RMSNorm):
    """The final norm where the head applies it to the label rows itself (kernels/pair_loss.py): holds the weight only."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class LabelRowLayer(TransformerLayer):
    """A transformer layer of local modules that returns the label rows only: [tokens (/ TP), 1, hidden] -> [labels, 1, hidden].

    The label rows are whole on every tensor-parallel process, also under sequence parallelism: the residual rows, each held
    by one process, join the sum of the attention output's parts.  So everything after attention works without sequence
    parallelism, and its norm's gradient is complete on every process.
    """

    def __init__(self, config, submodules, **kwargs):
        self.sequence_parallel = config.sequence_parallel
        whole_rows = copy.copy(config)
        whole_rows.sequence_parallel = False
        super().__init__(whole_rows, submodules, **kwargs)
        self.input_layernorm.weight.sequence_parallel = self.sequence_parallel

    def forward(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor, packed_seq_params: LabelledSequences, **_
    ) -> tuple[Tensor, None]:
        sequences, attention = packed_seq_params, self.self_attention
        rows = sequences.label_rows
        normed = self.input_layernorm(hidden_states)
        if self.sequence_parallel:
            normed = gather_from_sequence_parallel_region(normed, group=self.tp_group)
        else:
            normed = copy_to_tensor_model_parallel_region(normed, group=self.tp_group)
        query, key, value = self._query_key_value(normed, rows)
        query = apply_rotary_pos_emb(
            query.unsqueeze(1), rotary_pos_emb[sequences.label_positions], attention.config, cp_group=attention.pg_collection.cp
        ).squeeze(1)
        key = apply_rotary_pos_emb(
            key, rotary_pos_emb, attention.config, sequences.cu_seqlens_kv, cp_group=attention.pg_collection.cp
        )
        attended = attention.core_attention(
            query, key, value, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=sequences.of_labels()
        )
        part = F.linear(attended.flatten(1).unsqueeze(1), attention.linear_proj.weight)
        if self.sequence_parallel:
            hidden = reduce_from_tensor_model_parallel_region(part + self._held(hidden_states, rows), group=self.tp_group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(part, group=self.tp_group) + hidden_states[rows]
        return self._forward_mlp(hidden), None

    def _query_key_value(self, normed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens, 1, hidden] -> query [labels, heads, dim], key and value [tokens, groups, dim].

        Megatron stores the projections group by group: the group's queries, its key, its value.
        """
        attention = self.self_attention
        groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        weight = attention.linear_qkv.weight.view(groups, -1, dim, normed.shape[-1])
        normed = normed.squeeze(1)
        query = F.linear(normed[rows], weight[:, :-2].flatten(0, 2)).unflatten(-1, (-1, dim))
        key, value = F.linear(normed, weight[:, -2:].flatten(0, 2)).unflatten(-1, (groups, 2, dim)).unbind(2)
        if attention.config.qk_layernorm:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        return query, key, value

    def _held(self, hidden_states: Tensor, rows: Tensor) -> Tensor:
        """The rows that this process holds, zeros for the others."""
        local = rows - self.tp_group.rank() * len(hidden_states)
        owned = (local >= 0) & (local < len(hidden_states))
        return hidden_states[local.clamp(0, len(hidden_states) - 1)] * owned[:, None, None].to(hidden_states.dtype)


def label_row_layer_spec(qk_layernorm: bool) -> ModuleSpec:
    """The local layer as a LabelRowLayer; checkpoint keys are those of any other layer."""
    return replace(local_layer_spec(qk_layernorm), module=LabelRowLayer)
