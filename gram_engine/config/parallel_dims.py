"""The sizes of a parallel layout, what follows from them, and the rules that the trainer and the planner both apply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterator, Optional

if TYPE_CHECKING:
    from gram_engine.config.schema import Config


@dataclass(frozen=True)
class ParallelDims:
    """How `world_size` processes are split up; the other fields are ParallelConfig's under shorter names."""

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    layers_per_virtual_stage: Optional[int] = None
    first_stage_layers: Optional[int] = None
    last_stage_layers: Optional[int] = None
    sequence_parallel: bool = False

    @property
    def model_parallel_size(self) -> int:
        """Processes that work on the same samples: TP x PP x CP."""
        return self.tp * self.pp * self.cp

    @property
    def data_parallel_size(self) -> int:
        """Groups of processes that work on different samples."""
        return self.world_size // self.model_parallel_size

    def rules(self, config: Config) -> Iterator[tuple[bool, str]]:
        """(violated, message) of each rule for this layout of a model whose shape is resolved, in order.

        A rule may rely on those before it: stop at the first one that is violated.
        """
        tp, pp, cp, product = self.tp, self.pp, self.cp, self.model_parallel_size
        yield min(tp, pp, cp) < 1, f"TP {tp}, PP {pp} and CP {cp} must be at least 1."
        yield self.world_size % product != 0, (
            f"{self.world_size} processes cannot form TP {tp} x PP {pp} x CP {cp}: their number must be a multiple of "
            f"{product}. Start torchrun with --nproc-per-node {product} (or a multiple), or lower the sizes."
        )
        yield from self._tensor_rules(config)
        yield from self._context_rules(config)
        yield from self._pipeline_rules(config.model.num_layers)

    def _tensor_rules(self, config: Config) -> Iterator[tuple[bool, str]]:
        tp, model = self.tp, config.model
        heads, groups = model.num_attention_heads, model.num_query_groups
        yield heads % tp != 0, (
            f"--tensor-model-parallel-size {tp} does not divide the {heads} attention heads. Use a divisor of {heads}."
        )
        yield groups % tp != 0, (
            f"--tensor-model-parallel-size {tp} does not divide the {groups} key/value heads (--num-query-groups). "
            f"Use a divisor of {groups}."
        )
        yield model.ffn_hidden_size % tp != 0, (
            f"--tensor-model-parallel-size {tp} does not divide --ffn-hidden-size {model.ffn_hidden_size}."
        )
        yield self.sequence_parallel and tp == 1, "--sequence-parallel needs --tensor-model-parallel-size above 1."

    def _context_rules(self, config: Config) -> Iterator[tuple[bool, str]]:
        cp, seq_length = self.cp, config.data.seq_length
        yield cp > 1 and config.has_scalar_head, (
            f"--objective bradley-terry compares the ends of two sequences, which --context-parallel-size {cp} would put on "
            "different processes. Leave it out; for long samples use --tensor-model-parallel-size with --sequence-parallel, "
            "and --recompute-granularity full."
        )
        yield cp > 1 and seq_length % (2 * cp) != 0, (
            f"--context-parallel-size {cp} cuts every sample into {2 * cp} chunks: --seq-length {seq_length} must be "
            f"a multiple of {2 * cp}."
        )

    def _pipeline_rules(self, layers: int) -> Iterator[tuple[bool, str]]:
        pp, first, last, chunk = self.pp, self.first_stage_layers, self.last_stage_layers, self.layers_per_virtual_stage
        uneven = first is not None or last is not None
        by_stage = layers_by_stage(layers, pp, first, last)
        yield not uneven and by_stage is None, (
            f"--pipeline-model-parallel-size {pp} does not divide --num-layers {layers}. Use a divisor of {layers}, or give "
            "the last stage another number with --decoder-last-pipeline-num-layers."
        )
        yield uneven and pp < 2, (
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need --pipeline-model-parallel-size "
            "of at least 2."
        )
        yield uneven and by_stage is None, (
            f"--num-layers {layers} cannot be spread over {pp} pipeline stages with "
            f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last}: the remaining layers "
            "must divide evenly among the other stages, at least one layer each."
        )
        if chunk is None:
            return
        yield uneven, (
            "--num-layers-per-virtual-pipeline-stage needs equal pipeline stages: leave out "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."
        )
        yield pp < 2, "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2."
        yield chunk < 1 or (layers // pp) % chunk != 0 or layers // pp == chunk, (
            f"--num-layers-per-virtual-pipeline-stage {chunk} must divide the {layers // pp} layers of a stage "
            "into at least two virtual stages."
        )


def layers_by_stage(layers: int, stages: int, first: int | None = None, last: int | None = None) -> list[int] | None:
    """Layers of each pipeline stage, over all of its virtual stages; None where they do not divide into whole stages.

    Args:
        first, last: layers of the first and the last stage; None: as many as each stage between them.
    """
    given = [first, *[None] * (stages - 2), last] if stages > 1 else [None]
    open_stages = given.count(None)
    remaining = layers - sum(count or 0 for count in given)
    each, left_over = divmod(remaining, open_stages) if open_stages else (0, remaining)
    spread = [each if count is None else count for count in given]
    return None if left_over or min(spread) < 1 else spread
