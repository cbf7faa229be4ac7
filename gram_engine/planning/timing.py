"""An estimate of a step's time: matrix products at an assumed efficiency, the pipeline bubble, collectives at link speed.

Ranks are in Megatron's order: tensor parallel ranks are neighbours, then come context, data and pipeline parallel ones; a
group that spans nodes is charged at the network's speed.  Not in the estimate: the lower efficiency of small matrix
products, uneven packs, data loading, checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from gram_engine.config.schema import Config
from gram_engine.planning.flops import forward_flops, passes
from gram_engine.planning.memory import GPU, Engine, trained_count
from gram_engine.planning.pipeline_balance import Work, stage_costs, stage_layers


@dataclass(frozen=True)
class Hardware:
    """GPUs and links; the defaults are those of nodes of eight H100 or H200."""

    peak_tflops: float = 989.0
    """Dense bf16 peak of one GPU."""
    efficiency: float = 0.5
    """Fraction of the peak that matrix products reach."""
    fp8_gain: float = 1.35
    """Speedup of a stage's computation in FP8 over bf16 (Megatron-Bridge's guide: 1.2 to 1.5)."""
    nvlink_gb_s: float = 450.0
    """NVLink bandwidth of one GPU, GB/s in each direction."""
    network_gb_s: float = 50.0
    """Network bandwidth of one GPU, GB/s in each direction; default: 400 Gb/s InfiniBand."""
    memory_gb_s: float = 3350.0
    """Memory bandwidth of one GPU, GB/s; it bounds the optimizer step."""
    gpus_per_node: int = 8
    """GPUs of a node, connected by NVLink."""
    overlap: float = 0.8
    """Fraction of the data-parallel (and, with virtual stages, pipeline) communication that is hidden behind computation."""

    def bytes_per_second(self, size: int, stride: int) -> float:
        """Bandwidth of one GPU in a collective of `size` GPUs whose ranks are `stride` apart.

        A group that spans nodes shares the network links of its GPUs in each node.
        """
        if size * stride <= self.gpus_per_node:
            return 1e9 * self.nvlink_gb_s
        in_node = max(1, self.gpus_per_node // stride)
        return 1e9 * min(self.nvlink_gb_s, in_node * self.network_gb_s)


@dataclass(frozen=True)
class Batch:
    """One step.

    tokens: of one micro-batch on one process (a pack's tokens / CP).
    microbatches: of one data-parallel group.
    work: of the whole step, over all processes.
    """

    tokens: float
    microbatches: int
    work: Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by kind; communication that is hidden behind computation is left out."""

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


def step_time(config: Config, batch: Batch, data_parallel: int, hardware: Hardware, engine: Engine = GPU) -> StepTime:
    """Time of one step at the pace of the pipeline's slowest stage."""
    parallel, model = config.parallel, config.model
    tp, pp, cp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    chunks, count = config.virtual_pipeline_size or 1, batch.microbatches
    element = 2 if config.training.bf16 else 4
    layers = stage_layers(config)
    recomputed = 1 if config.training.recompute_granularity == "full" else 0

    slowest = max(stage_costs(config, layers, batch.work)) * forward_flops(config, *batch.work) / pp
    processes = tp * cp * data_parallel
    gain = hardware.fp8_gain if config.training.fp8_format else 1.0
    flops_per_second = 1e12 * hardware.peak_tflops * hardware.efficiency * gain
    compute = (passes(config) + recomputed) * slowest / processes / count / flops_per_second

    row_bytes = element * model.hidden_size * batch.tokens
    # A layer gathers and scatters (or all-reduces) twice forward and twice backward.
    tensor = (8 + 4 * recomputed) * max(layers) * row_bytes * (tp - 1) / tp / hardware.bytes_per_second(tp, 1)
    # Keys and values go round the ring once forward; backward, they and their gradients do.
    key_value = 2 * element * model.num_query_groups * model.kv_channels / tp * batch.tokens
    context = (3 + recomputed) * max(layers) * (cp - 1) * key_value / _neighbour(hardware, cp, tp)
    pipeline = 0.0
    if pp > 1:
        share = tp if parallel.sequence_parallel else 1
        hidden = hardware.overlap if chunks > 1 else 0.0
        pipeline = 2 * chunks * (1 - hidden) * row_bytes / share / _neighbour(hardware, pp, processes)
    slot = compute + tensor + context + pipeline

    trained = max(trained_count(config, stage) for stage in (0, pp - 1))
    copies = data_parallel * cp
    sharded = parallel.use_distributed_optimizer
    gathered = element if sharded else engine.gradient_bytes
    sent = (engine.gradient_bytes + gathered) * trained * (copies - 1) / copies
    # The optimizer reads gradient, moments and main parameter; it writes moments, main parameter and model parameter.
    optimizer_bytes = 30 * trained / (copies if sharded else 1)
    return StepTime(
        compute=count * compute,
        bubble=(pp - 1) / chunks * slot,
        tensor_parallel=count * tensor,
        context_parallel=count * context,
        pipeline_parallel=count * pipeline,
        data_parallel=(1 - hardware.overlap) * sent / hardware.bytes_per_second(copies, tp),
        optimizer=optimizer_bytes / (1e9 * hardware.memory_gb_s),
    )


def _neighbour(hardware: Hardware, size: int, stride: int) -> float:
    """Bytes per second from a GPU to the next one of its group, which may be in another node."""
    return 1e9 * (hardware.nvlink_gb_s if size * stride <= hardware.gpus_per_node else hardware.network_gb_s)
