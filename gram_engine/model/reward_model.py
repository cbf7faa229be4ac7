"""RewardModel: megatron-core's GPTModel whose last stage hands hidden rows to an objective instead of making logits."""

from __future__ import annotations

from typing import Any, Callable, Optional

from megatron.core.models.gpt import GPTModel
from torch import Tensor

OutputProcessor = Callable[..., Any]


class RewardModel(GPTModel):
    """GPTModel with an output hook.

    `output_processor(hidden_states=, output_weight=, context=)` runs on the last pipeline stage with
    hidden_states [tokens, 1, hidden] after the final norm (a [tokens / TP] slice under sequence parallelism) and this
    tensor-parallel process's rows of the output weight [padded vocabulary / TP, hidden]; what it returns is what the
    model returns.  Full [tokens, vocabulary] logits never exist.  Without a hook it behaves as GPTModel.

    megatron-core 0.18 has this hook as arguments of GPTModel.forward with the same names.  Checkpoint keys are GPTModel's.
    """

    _output_processor: Optional[OutputProcessor] = None
    _output_processor_context: Any = None

    def forward(
        self,
        *args,
        output_processor: Optional[OutputProcessor] = None,
        output_processor_context: Any = None,
        **kwargs,
    ):
        """GPTModel.forward with the hook. Middle stages return hidden states [tokens, 1, hidden] as usual."""
        self._output_processor = output_processor
        self._output_processor_context = output_processor_context
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._output_processor = self._output_processor_context = None

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs):
        if self._output_processor is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, **kwargs)
        tied = self.share_embeddings_and_output_weights
        return self._output_processor(
            hidden_states=hidden_states,
            output_weight=self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            context=self._output_processor_context,
        )
