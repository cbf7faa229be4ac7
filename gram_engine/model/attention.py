"""Attention modules of a layer: rotary position embedding, then causal attention within each sequence of a pack."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import jit
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gram_engine.kernels.attention import AttentionBounds, packed_attention
from gram_engine.model.rotary import rotate


@dataclass
class PackSequences(PackedSeqParams):
    """PackedSeqParams with what the attention modules and the pruned last layer need.

    Attributes:
        cos, sin: [tokens, 1, dim / 2] in the model's dtype, for this process's tokens (model/rotary.py); set by RewardModel.
        attention: bounds for all tokens as queries.
        label_attention: bounds for the label rows as queries.  With context parallelism the key rows of both refer to the
            gathered tokens of all context-parallel processes (data/context_parallel.py).
        label_rows: int64 [labels], indices of the label rows among this process's tokens.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    attention: AttentionBounds | None = None
    label_attention: AttentionBounds | None = None
    label_rows: Tensor | None = None


@jit.jit_fuser
def rotate_heads(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate`, compiled to one kernel on a GPU."""
    return rotate(heads, cos, sin)


class PackedAttention(MegatronModule):
    """Core attention of layers without Transformer Engine: causal within each sequence of a pack.

    Its inputs are query [tokens, heads, dim], key and value [tokens, groups, dim] (layout thd), before the rotary position
    embedding; its output is [tokens, heads * dim] in the dtype of the query.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_):
        super().__init__(config=config)
        self.cp_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, packed_seq_params: PackSequences, **_
    ) -> Tensor:
        sequences = packed_seq_params
        query, key = (rotate_heads(part, sequences.cos, sequences.sin) for part in (query, key))
        key, value = (gather_keys(part, self.cp_group) for part in (key, value))
        return packed_attention(query, key, value, sequences.attention).flatten(1)


def transformer_engine_attention() -> type:
    """A class: Transformer Engine's attention, preceded by our rotary position embedding; inputs as for PackedAttention."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class RotaryTEDotProductAttention(TEDotProductAttention):
        def forward(self, query: Tensor, key: Tensor, *args, packed_seq_params: PackSequences, **options) -> Tensor:
            query, key = (rotate_heads(part, packed_seq_params.cos, packed_seq_params.sin) for part in (query, key))
            return super().forward(query, key, *args, packed_seq_params=packed_seq_params, **options)

    return RotaryTEDotProductAttention


def gather_keys(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather keys or values over the context-parallel group: [tokens / size, ...] -> [tokens, ...], in rank order.

    The backward pass is a reduce-scatter: the gradients are summed, and each process gets those of its own rows.
    """
    return part if dist.get_world_size(group) == 1 else gather_from_sequence_parallel_region(part, group=group)
