"""The feasible layouts of a model on a number of GPUs, the memory and time that each needs, and the best of them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Iterator, Literal, Optional

from gram_engine.config.parallel_dims import ParallelDims
from gram_engine.config.parse import flag_words
from gram_engine.config.schema import Config, ModelConfig
from gram_engine.errors import ConfigError
from gram_engine.planning.flops import forward_flops, passes
from gram_engine.planning.memory import GIB, GPU, Engine, Memory, Pack, peak_memory
from gram_engine.planning.pipeline_balance import Work
from gram_engine.planning.timing import Batch, Hardware, StepTime, step_time

MICRO_BATCHES = (1, 2, 4, 8)
TIE = 1.02
"""Steps whose times differ by less than this factor count as equally fast."""


@dataclass(frozen=True)
class Layout:
    """One way to run the model on the GPUs: ParallelDims' sizes, micro-batch size and recomputation.

    vpp: virtual stages per pipeline stage; 1: no virtual stages.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    mbs: int = 1
    recompute: Literal["none", "full"] = "none"

    def dims(self, gpus: int, num_layers: int) -> ParallelDims:
        """The layout over `gpus` processes, for a model whose layers divide evenly over PP x VPP."""
        chunk = num_layers // (self.pp * self.vpp) if self.vpp > 1 else None
        return ParallelDims(gpus, self.tp, self.pp, self.cp, layers_per_virtual_stage=chunk, sequence_parallel=self.tp > 1)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


@dataclass(frozen=True)
class Cluster:
    """GPUs to plan for. gpu_memory_gb is in GiB, which is what vendors mean by 80 GB and 141 GB."""

    gpus: int
    gpu_memory_gb: float
    hardware: Hardware = Hardware()
    engine: Engine = GPU


@dataclass(frozen=True)
class Data:
    """What the layouts train on.

    sample_tokens: mean tokens of a sample, over all its texts.
    response_fraction: fraction of these tokens that carries loss in stage 1.
    """

    sample_tokens: float
    response_fraction: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A layout with the memory and time that it needs. memory: of the fullest process, which is of pipeline stage `stage`."""

    layout: Layout
    config: Config
    dims: ParallelDims
    microbatches: int
    stage: int
    memory: Memory
    time: StepTime
    tokens_per_gpu_second: float
    tflops_per_gpu: float
    reason: Optional[str]
    """Why it does not fit; None where it fits."""

    @property
    def fits(self) -> bool:
        return self.reason is None


def parse_layout(text: str) -> Layout:
    """`tp=4 pp=8 vpp=5 cp=1 mbs=1 recompute=full`, any of them left out.

    Raises:
        ConfigError: an unknown key or a value that is not a positive number.
    """
    values: dict = {}
    names = [field.name for field in dataclasses.fields(Layout)]
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        if name not in names:
            raise ConfigError(f"--layout: unknown size '{name}'. Known: {', '.join(names)}, as in \"tp=4 pp=8 vpp=5 mbs=1\".")
        if name == "recompute":
            wrong, wanted, values[name] = value not in ("none", "full"), "none or full", value
        else:
            wrong, wanted = not value.isdigit() or int(value) < 1, "a positive number"
            values[name] = int(value) if value.isdigit() else value
        if wrong:
            raise ConfigError(f"--layout: {name}={value} is not {wanted}.")
    return Layout(**values)


def infeasibility_reason(config: Config, layout: Layout, gpus: int) -> Optional[str]:
    """Why this layout cannot run on so many GPUs, whatever their memory; None if it can."""
    layers, stages = config.model.num_layers, layout.pp * layout.vpp
    if layout.vpp > 1 and layers % stages != 0:
        return f"PP {layout.pp} x VPP {layout.vpp} does not divide the {layers} layers."
    dims = layout.dims(gpus, layers)
    for violated, message in dims.rules(config):
        if violated:
            return message
    samples, groups = config.training.global_batch_size, dims.data_parallel_size
    if samples < groups:
        return f"--global-batch-size {samples} is less than one sample for each of the {groups} data-parallel groups."
    return None


def configured(config: Config, layout: Layout, gpus: int) -> Config:
    """A copy of the configuration with the layout's settings."""
    made = copy.deepcopy(config)
    dims = layout.dims(gpus, config.model.num_layers)
    parallel, training = made.parallel, made.training
    parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size = dims.tp, dims.pp
    parallel.context_parallel_size, parallel.sequence_parallel = dims.cp, dims.sequence_parallel
    parallel.num_layers_per_virtual_pipeline_stage = dims.layers_per_virtual_stage
    copies = dims.data_parallel_size * dims.cp
    parallel.use_distributed_optimizer = parallel.overlap_grad_reduce = parallel.overlap_param_gather = copies > 1
    training.fp8_param_gather = training.fp8_format is not None and copies > 1
    training.micro_batch_size = layout.mbs
    training.recompute_granularity = "full" if layout.recompute == "full" else None
    return made


def evaluate(config: Config, layout: Layout, cluster: Cluster, data: Data) -> Plan:
    """Memory and time of one layout.

    Raises:
        ConfigError: the trainer would refuse the layout, or it has too few samples for the data-parallel groups.
    """
    reason = infeasibility_reason(config, layout, cluster.gpus)
    if reason is not None:
        raise ConfigError(f"Layout {layout}: {reason}")
    made = configured(config, layout, cluster.gpus)
    dims = made.parallel.dims(cluster.gpus)
    pack, batch = _workload(made, dims, data)
    shards = dims.data_parallel_size * dims.cp if made.parallel.use_distributed_optimizer else 1
    by_stage = [peak_memory(made, stage, pack, batch.microbatches, shards, cluster.engine) for stage in range(dims.pp)]
    stage = max(range(dims.pp), key=lambda number: by_stage[number].total)
    time = step_time(made, batch, dims.data_parallel_size, cluster.hardware, cluster.engine)
    return Plan(
        layout=layout,
        config=made,
        dims=dims,
        microbatches=batch.microbatches,
        stage=stage,
        memory=by_stage[stage],
        time=time,
        tokens_per_gpu_second=batch.work.tokens / time.total / cluster.gpus,
        tflops_per_gpu=passes(made) * forward_flops(made, *batch.work) / time.total / cluster.gpus / 1e12,
        reason=_memory_shortage(by_stage[stage], layout, stage, cluster.gpu_memory_gb),
    )


def _workload(config: Config, dims: ParallelDims, data: Data) -> tuple[Pack, Batch]:
    """(the fullest micro-batch, which decides the memory; the step with its mean micro-batch, which decides the time)"""
    samples, sequences = config.training.global_batch_size, config.task.sequences_per_sample
    own_samples = math.ceil(samples / dims.data_parallel_size)
    in_pack = min(own_samples, max(1, int(config.pack_tokens // data.sample_tokens)))
    microbatches = math.ceil(own_samples / in_pack)
    if dims.layers_per_virtual_stage is not None:
        microbatches = -(-microbatches // dims.pp) * dims.pp
    stage_1 = not config.task.needs_labels
    sample_rows = data.response_fraction * data.sample_tokens if stage_1 else sequences
    work = Work(samples * data.sample_tokens, samples * sample_rows, samples * data.sample_tokens**2 / sequences)
    fullest = min(config.training.micro_batch_size, own_samples) * sequences * config.data.seq_length
    full_rows = fullest * data.response_fraction / dims.cp if stage_1 else sequences * in_pack
    return Pack(fullest / dims.cp, full_rows), Batch(in_pack * data.sample_tokens / dims.cp, microbatches, work)


def _memory_shortage(memory: Memory, layout: Layout, stage: int, gpu_memory_gb: float) -> Optional[str]:
    """What a GPU has too little memory for, and the remedy; None where it has enough."""
    gib = {name: value / GIB for name, value in dataclasses.asdict(memory).items()}
    total = memory.total / GIB
    if total <= gpu_memory_gb:
        return None
    states = gib["parameters"] + gib["gradients"] + gib["optimizer"]
    where = f" on pipeline stage {stage}" if layout.pp > 1 else ""
    needs = f"needs {total:.1f} of {gpu_memory_gb:g} GB{where}: "
    split = f"parameters {gib['parameters']:.1f}, gradients {gib['gradients']:.1f}, optimizer {gib['optimizer']:.1f}"
    if states > gpu_memory_gb - gib["overhead"]:
        return f"{needs}{split} alone leave too little. Raise TP or PP, or add data-parallel GPUs to share the optimizer."
    rest = gib["activations"] + gib["logits"] + gib["temporary"]
    remedy = "Lower mbs, raise TP or CP" + ("." if layout.recompute == "full" else ", or recompute=full.")
    return f"{needs}{split}, and {rest:.1f} for activations, logits and temporaries. {remedy}"


def candidates(config: Config, cluster: Cluster) -> Iterator[Layout]:
    """Every feasible layout without recomputation; tensor parallelism stays within a node."""
    gpus, layers = cluster.gpus, config.model.num_layers
    for tp, pp, cp in itertools.product(_divisors(min(gpus, cluster.hardware.gpus_per_node)), _divisors(layers), (1, 2, 4, 8)):
        for vpp, mbs in itertools.product(_divisors(layers // pp) if pp > 1 else [1], MICRO_BATCHES):
            layout = Layout(tp, pp, vpp, cp, mbs)
            if infeasibility_reason(config, layout, gpus) is None:
                yield layout


def best_layouts(config: Config, cluster: Cluster, data: Data, count: int) -> list[Plan]:
    """The fastest layouts that fit or, where none fits, those that need the least memory.

    Layouts that do not fit are tried again with full recomputation.  Layouts as fast as the fastest (within TIE) are ordered
    by simplicity.  Of layouts that differ only in VPP, CP and micro-batch size, the first is kept, so that the list shows
    different choices.

    Raises:
        ConfigError: no layout is feasible.
    """
    plans: list[Plan] = []
    for layout in candidates(config, cluster):
        plan = evaluate(config, layout, cluster, data)
        if not plan.fits:
            plan = evaluate(config, dataclasses.replace(layout, recompute="full"), cluster, data)
        plans.append(plan)
    if not plans:
        raise ConfigError(
            f"No layout of {cluster.gpus} GPUs can be built for --global-batch-size {config.training.global_batch_size}: "
            f"{infeasibility_reason(config, Layout(), cluster.gpus)}"
        )
    fitting = [plan for plan in plans if plan.fits]
    fastest = min((plan.time.total for plan in fitting), default=0.0)

    def rank(plan: Plan) -> tuple:
        dims, vpp = plan.dims, plan.layout.vpp
        return max(plan.time.total, TIE * fastest), dims.model_parallel_size, dims.pp, vpp, plan.time.total

    ranked = sorted(fitting, key=rank) if fitting else sorted(plans, key=lambda plan: plan.memory.total)
    first: dict[tuple, Plan] = {}
    for plan in ranked:
        first.setdefault((plan.layout.tp, plan.layout.pp, plan.layout.recompute), plan)
    return list(first.values())[:count]


def flags(plan: Plan, given: ModelConfig) -> list[str]:
    """The trainer's flags for a plan, to go with --data, --tokenizer-model and the run's length.

    `given` is the model as the user gave it, before the preset filled it in.
    """
    data, parallel, training = plan.config.data, plan.config.parallel, plan.config.training
    settings = _changed(given) | _values(training, "objective") | _values(data, "seq_length")
    settings |= _values(parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size") | _changed(parallel)
    settings |= _values(training, "micro_batch_size", "global_batch_size") | _changed(training)
    return [word for name, value in settings.items() for word in flag_words(name, value)]


def _values(section: object, *names: str) -> dict:
    return {name: getattr(section, name) for name in names}


def _changed(section: object) -> dict:
    """The fields of a configuration's section that differ from their defaults."""
    values = {field: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {field.name: value for field, value in values.items() if value != field.default}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
