"""An estimate of a step's time: matrix products at a stated efficiency, the pipeline's bubble, collectives at stated speeds.

Megatron places tensor-parallel processes next to each other, then context, data and pipeline parallel ones; a group that
reaches beyond a node is charged at the network's speed.  Not in the estimate: matrix products that are slow because they are
small, uneven packs, data loading, checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from gram_engine.config.schema import Config
from gram_engine.planning.flops import head_flops, last_layer_flops, layer_flops, passes
from gram_engine.planning.memory import GPU, Engine, trained_count
from gram_engine.planning.pipeline_balance import Work, stage_costs, stage_layers


@dataclass(frozen=True)
class Hardware:
    """GPUs and links; the defaults are those of nodes of eight H100 or H200."""

    peak_tflops: float = 989.0
    """Dense bf16 peak of one GPU."""
    efficiency: float = 0.5
    """Part of the peak that a stage reaches while it computes."""
    fp8_gain: float = 1.35
    """How much faster a stage computes in FP8 than in bf16 (Megatron-Bridge's guide: 1.2 to 1.5)."""
    nvlink_gb_s: float = 450.0
    """GB/s of one GPU to others of its node, in each direction."""
    network_gb_s: float = 50.0
    """GB/s of one GPU to other nodes (400 Gb/s InfiniBand), in each direction."""
    memory_gb_s: float = 3350.0
    """GB/s of a GPU's memory: the optimizer's pace."""
    gpus_per_node: int = 8
    """GPUs joined by NVLink."""
    overlap: float = 0.8
    """Part of the data-parallel (and, with virtual stages, pipeline) communication hidden behind computation."""

    def bytes_per_second(self, size: int, stride: int) -> float:
        """Of one GPU in a collective of `size` GPUs, `stride` apart.

        Beyond a node it runs at the pace of the links out of it: as many as the node has GPUs in the group.
        """
        if size * stride <= self.gpus_per_node:
            return 1e9 * self.nvlink_gb_s
        in_node = max(1, self.gpus_per_node // stride)
        return 1e9 * min(self.nvlink_gb_s, in_node * self.network_gb_s)


@dataclass(frozen=True)
class Batch:
    """One step as a process sees it.

    tokens: of one micro-batch on this process (a pack's / CP); microbatches: on this process; work: of the whole step.
    """

    tokens: float
    microbatches: int
    work: Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they go to; collectives that are hidden behind computation are left out."""

    compute: float
    bubble: float
    tensor_parallel: float
    context_parallel: float
    pipeline_parallel: float
    data_parallel: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def forward_flops(config: Config, work: Work) -> float:
    """Of one step, over all processes."""
    layers = (config.model.num_layers - 1) * layer_flops(config, work.tokens, work.squared_lengths)
    last = last_layer_flops(config, work.tokens, work.rows, work.squared_lengths)
    return layers + last + head_flops(config, work.rows)


def step_time(config: Config, batch: Batch, data_parallel: int, hardware: Hardware, engine: Engine = GPU) -> StepTime:
    """Time of one step at the pace of the pipeline's slowest stage."""
    parallel, model = config.parallel, config.model
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    chunks, count = config.virtual_pipeline_size or 1, batch.microbatches
    element = 2 if config.training.bf16 else 4
    layers = stage_layers(config)
    again = 1 if config.training.recompute_granularity == "full" else 0

    slowest = max(stage_costs(config, layers, batch.work)) * forward_flops(config, batch.work) / pp
    processes = tp * cp * data_parallel
    gain = hardware.fp8_gain if config.training.fp8_format else 1.0
    flops_per_second = 1e12 * hardware.peak_tflops * hardware.efficiency * gain
    compute = (passes(config) + again) * slowest / processes / count / flops_per_second

    row_bytes = element * model.hidden_size * batch.tokens
    # A layer gathers and scatters (or all-reduces) twice forward and twice backward.
    tensor = (8 + 4 * again) * max(layers) * row_bytes * (tp - 1) / tp / hardware.bytes_per_second(tp, 1)
    # Keys and values go round once forward, and with their gradients twice backward.
    key_value = 2 * element * model.num_query_groups * model.kv_channels / tp * batch.tokens
    context = (3 + again) * max(layers) * (cp - 1) * key_value / _neighbour(hardware, cp, tp)
    pipeline = 0.0
    if pp > 1:
        share = tp if parallel.sequence_parallel else 1
        hidden = hardware.overlap if chunks > 1 else 0.0
        pipeline = 2 * chunks * (1 - hidden) * row_bytes / share / _neighbour(hardware, pp, processes)
    slot = compute + tensor + context + pipeline

    own = max(trained_count(config, stage) for stage in (0, pp - 1))
    copies = data_parallel * cp
    sharded = parallel.use_distributed_optimizer
    gathered = element if sharded else engine.gradient_bytes
    exchanged = (engine.gradient_bytes + gathered) * own * (copies - 1) / copies
    optimizer_bytes = 30 * own / (copies if sharded else 1)  # gradient, moments and main parameter read, the latter written
    return StepTime(
        compute=count * compute,
        bubble=(pp - 1) / chunks * slot,
        tensor_parallel=count * tensor,
        context_parallel=count * context,
        pipeline_parallel=count * pipeline,
        data_parallel=(1 - hardware.overlap) * exchanged / hardware.bytes_per_second(copies, tp),
        optimizer=optimizer_bytes / (1e9 * hardware.memory_gb_s),
    )


def _neighbour(hardware: Hardware, size: int, stride: int) -> float:
    """Bytes per second from a GPU to the next of its group, which may sit in another node."""
    return 1e9 * (hardware.nvlink_gb_s if size * stride <= hardware.gpus_per_node else hardware.network_gb_s)
