"""RewardModel: megatron-core's GPTModel whose last stage passes hidden rows to an objective instead of computing logits."""

from __future__ import annotations

from typing import Any, Callable, Optional

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor
from torch.nn import Module

from gram_engine.model.attention import PackSequences
from gram_engine.model.layers import wait_for_parameters
from gram_engine.model.rotary import cos_and_sin
from gram_engine.model.scalar_head import ScalarHead

OutputProcessor = Callable[..., Any]


class RewardModel(GPTModel):
    """GPTModel with an output hook.

    On the last pipeline stage the model returns the result of `output_processor(hidden_states=, output_weight=, context=)`:

        hidden_states: [tokens, 1, hidden] after the final norm ([tokens / TP, 1, hidden] under sequence parallelism).  If
            the last layer is pruned (model/label_rows.py), [labels, 1, hidden] before the final norm.
        output_weight: [padded vocabulary / TP, hidden], the rows of this tensor-parallel process, or None.

    The full [tokens, vocabulary] logits never exist.  Without a hook it behaves as GPTModel.  megatron-core 0.18 has this
    hook as arguments of GPTModel.forward with the same names.  The checkpoint keys are GPTModel's.

    Args:
        inverse_frequencies: of the rotary position embedding, [dim / 2] fp32; the attention modules apply it
            (model/attention.py).
        vocabulary_head: whether the objective needs the output layer; otherwise the model has none, and `output_weight` is
            None.
        scalar_head: whether the last stage has a scalar head, `score` (model/scalar_head.py).
        borrows_label_rows: for tied embeddings and pipeline parallelism, if the objective needs only the label tokens' rows
            of the output weight: it gets them from the first stage (objectives/label_head.py), the last stage has no copy of
            the embedding, and `output_weight` is None.
    """

    _output_processor: Optional[OutputProcessor] = None
    _output_processor_context: Any = None

    def __init__(
        self,
        *args,
        inverse_frequencies: Tensor,
        share_embeddings_and_output_weights: bool,
        borrows_label_rows: bool = False,
        vocabulary_head: bool = True,
        scalar_head: bool = False,
        **kwargs,
    ):
        self.owns_output_weight = vocabulary_head and not borrows_label_rows
        share = share_embeddings_and_output_weights and self.owns_output_weight
        super().__init__(*args, share_embeddings_and_output_weights=share, position_embedding_type="none", **kwargs)
        # Not a buffer, because Float16Module would round it.
        self.inverse_frequencies = inverse_frequencies
        self.borrows_label_rows = borrows_label_rows
        if self.post_process and not self.owns_output_weight:
            self.output_layer.weight = None
        if self.post_process and scalar_head:
            self.score = ScalarHead(self.config.hidden_size, self.config.params_dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *args,
        packed_seq_params: PackSequences,
        output_processor: Optional[OutputProcessor] = None,
        output_processor_context: Any = None,
        **kwargs,
    ):
        """GPTModel.forward with the hook; the other pipeline stages return hidden states [tokens, 1, hidden].

        Args:
            input_ids: int64 [1, tokens].
            position_ids: int64 [1, tokens], the position of each token in its sequence.
        """
        self._output_processor = output_processor
        self._output_processor_context = output_processor_context
        sequences, dtype = packed_seq_params, self.config.params_dtype
        sequences.cos, sequences.sin = cos_and_sin(position_ids.squeeze(0), self.inverse_frequencies, dtype)
        try:
            return super().forward(input_ids, position_ids, *args, packed_seq_params=sequences, **kwargs)
        finally:
            self._output_processor = self._output_processor_context = None

    def output_weight(self) -> Optional[Tensor]:
        """The output layer's weight on the last stage (the embedding's if they are tied and on one stage), or None."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None):
        """GPTModel's, without the output layer if this stage does not own its weight."""
        if self.post_process and not self.owns_output_weight:
            metadata = ensure_metadata_has_dp_cp_group(metadata)
            state = super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
            state.pop(f"{prefix}output_layer._extra_state", None)
            return state
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs):
        if self._output_processor is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, **kwargs)
        wait_for_parameters(self.output_layer)
        return self._output_processor(
            hidden_states=hidden_states, output_weight=self.output_weight(), context=self._output_processor_context
        )


def unwrap(chunk: Module) -> RewardModel:
    """The RewardModel inside DDP and Float16Module."""
    while not isinstance(chunk, RewardModel):
        chunk = chunk.module
    return chunk
