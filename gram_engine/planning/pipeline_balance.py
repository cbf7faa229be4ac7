"""The cost of each pipeline stage, and the number of layers of the last stage that balances the pipeline best.

A pipeline runs at the pace of its slowest stage.  Stage 1's output layer makes the last pipeline stage slower than the
others; stage 2's pruned last layer makes it faster, so that it can take more layers (--decoder-last-pipeline-num-layers).
"""

from __future__ import annotations

from typing import NamedTuple

from gram_engine.config.parallel_dims import layers_by_stage
from gram_engine.config.schema import Config
from gram_engine.planning.flops import head_flops, last_layer_flops, layer_flops


class Work(NamedTuple):
    """Sums over the samples of a data set."""

    tokens: float
    rows: float
    """Positions that run the output layer: response tokens (stage 1), samples (stage 2), ends of sequences (bradley-terry)."""
    squared_lengths: float


def stage_layers(config: Config) -> list[int]:
    """Layers of each pipeline stage, over all its virtual stages, of a configuration that validate.check accepts."""
    parallel = config.parallel
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    return layers_by_stage(config.model.num_layers, parallel.pipeline_model_parallel_size, first, last)


def stage_costs(config: Config, layers: list[int], work: Work) -> list[float]:
    """FLOPs of each pipeline stage for this work, relative to the mean stage."""
    layer = layer_flops(config, work.tokens, work.squared_lengths)
    costs = [count * layer for count in layers]
    costs[-1] += last_layer_flops(config, work.tokens, work.rows, work.squared_lengths) - layer
    costs[-1] += head_flops(config, work.rows)
    mean = sum(costs) / len(costs)
    return [cost / mean for cost in costs]


def balance_report(config: Config, work: Work) -> str:
    """One line: each stage's cost, and the number of layers of the last stage that makes the slowest stage fastest, if any."""
    layers = stage_layers(config)
    costs = stage_costs(config, layers, work)
    report = f"pipeline: layers {_joined(layers)} | cost of each stage (mean 1) {_joined(f'{cost:.2f}' for cost in costs)}"
    best, slowest = best_last_stage(config, work)
    if best is None or slowest >= 0.99 * max(costs):
        return report
    return f"{report} | --decoder-last-pipeline-num-layers {best} would make the slowest {slowest:.2f}"


def best_last_stage(config: Config, work: Work) -> tuple[int | None, float]:
    """(layers of the last stage, cost of the slowest stage with it), or (None, inf) where no number is possible."""
    stages, total = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    choices = {}
    if config.virtual_pipeline_size is None and config.parallel.decoder_first_pipeline_num_layers is None:
        for last in range(1, total):
            if layers := layers_by_stage(total, stages, last=last):
                choices[last] = max(stage_costs(config, layers, work))
    if not choices:
        return None, float("inf")
    best = min(choices, key=choices.get)
    return best, choices[best]


def _joined(values) -> str:
    return " ".join(str(value) for value in values)
