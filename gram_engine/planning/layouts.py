"""Which layouts there are for a model and a number of GPUs, what each needs, and which are best."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Iterator, Literal, Optional

from gram_engine.config.schema import Config, ModelConfig
from gram_engine.errors import ConfigError
from gram_engine.planning.flops import passes
from gram_engine.planning.memory import GIB, GPU, Engine, Memory, Pack, peak_memory
from gram_engine.planning.pipeline_balance import Work
from gram_engine.planning.timing import Batch, Hardware, StepTime, forward_flops, step_time

MICRO_BATCHES = (1, 2, 4, 8)
NEARLY = 1.02


@dataclass(frozen=True)
class Layout:
    """Sizes of each kind of parallelism (vpp: model chunks per stage, 1: none), micro-batch and recomputation."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    mbs: int = 1
    recompute: Literal["none", "full"] = "none"

    @property
    def model_parallel(self) -> int:
        """GPUs that work on the same data."""
        return self.tp * self.pp * self.cp

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


@dataclass(frozen=True)
class Cluster:
    """GPUs to plan for. gpu_memory_gb: in GiB, as vendors' 80 and 141 GB are meant."""

    gpus: int
    gpu_memory_gb: float
    hardware: Hardware = Hardware()
    engine: Engine = GPU


@dataclass(frozen=True)
class Data:
    """sample_tokens: mean length of a sample (all its texts); response_fraction: of its tokens, those that stage 1 learns."""

    sample_tokens: float
    response_fraction: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A layout with what it needs. memory: of the fullest process, of pipeline stage `stage`."""

    layout: Layout
    config: Config
    data_parallel: int
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


def obstacle(config: Config, layout: Layout, gpus: int) -> Optional[str]:
    """Why this layout cannot be built at all, or None."""
    model, tp, pp, vpp = config.model, layout.tp, layout.pp, layout.vpp
    data_parallel = gpus // layout.model_parallel
    context_cuts = 2 * layout.cp if layout.cp > 1 else 1
    rules = (
        (gpus % layout.model_parallel, f"{gpus} GPUs are no multiple of TP {tp} x PP {pp} x CP {layout.cp}"),
        (model.num_attention_heads % tp, f"TP {tp} does not divide the {model.num_attention_heads} attention heads"),
        (model.num_query_groups % tp, f"TP {tp} does not divide the {model.num_query_groups} key/value heads"),
        (model.ffn_hidden_size % tp, f"TP {tp} does not divide the feed-forward width {model.ffn_hidden_size}"),
        (model.num_layers % (pp * vpp), f"PP {pp} x VPP {vpp} does not divide the {model.num_layers} layers"),
        (vpp > 1 and pp == 1, f"VPP {vpp} needs PP of at least 2"),
        (layout.cp > 1 and config.has_scalar_head, "bradley-terry has no CP: the ends of a pair's texts would lie apart"),
        (config.data.seq_length % context_cuts, f"CP {layout.cp} cuts samples into {context_cuts} chunks; "
         f"--seq-length {config.data.seq_length} is no multiple of that"),
        (config.training.global_batch_size < data_parallel,
         f"--global-batch-size {config.training.global_batch_size} gives {data_parallel} data-parallel processes less than a "
         "sample each"),
    )  # fmt: skip
    return next((reason for broken, reason in rules if broken), None)


def configured(config: Config, layout: Layout, gpus: int) -> Config:
    """A copy of the configuration with the layout's settings."""
    made = copy.deepcopy(config)
    parallel, training = made.parallel, made.training
    parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size = layout.tp, layout.pp
    parallel.context_parallel_size = layout.cp
    parallel.sequence_parallel = layout.tp > 1
    if layout.vpp > 1:
        parallel.num_layers_per_virtual_pipeline_stage = config.model.num_layers // (layout.pp * layout.vpp)
    copies = gpus // (layout.tp * layout.pp)
    parallel.use_distributed_optimizer = parallel.overlap_grad_reduce = parallel.overlap_param_gather = copies > 1
    training.fp8_param_gather = training.fp8_format is not None and copies > 1
    training.micro_batch_size = layout.mbs
    training.recompute_granularity = "full" if layout.recompute == "full" else None
    return made


def evaluate(config: Config, layout: Layout, cluster: Cluster, data: Data) -> Plan:
    """Memory and time of one layout.

    Raises:
        ConfigError: the layout cannot be built.
    """
    reason = obstacle(config, layout, cluster.gpus)
    if reason is not None:
        raise ConfigError(f"Layout {layout}: {reason}.")
    made = configured(config, layout, cluster.gpus)
    samples = config.training.global_batch_size
    data_parallel = cluster.gpus // layout.model_parallel
    own_samples = math.ceil(samples / data_parallel)
    in_pack = min(own_samples, max(1, int(made.pack_tokens // data.sample_tokens)))
    microbatches = math.ceil(own_samples / in_pack)
    if layout.vpp > 1:
        microbatches = -(-microbatches // layout.pp) * layout.pp
    stage_1 = not config.task.needs_labels
    texts = made.task.sequences_per_sample
    sample_rows = data.response_fraction * data.sample_tokens if stage_1 else texts
    work = Work(samples * data.sample_tokens, samples * sample_rows, samples * data.sample_tokens**2 / texts)
    # The fullest pack counts for memory, the mean one for time.
    fullest = min(layout.mbs, own_samples) * texts * config.data.seq_length
    full_rows = fullest * data.response_fraction / layout.cp if stage_1 else texts * in_pack
    pack = Pack(fullest / layout.cp, full_rows)
    shards = data_parallel * layout.cp if made.parallel.use_distributed_optimizer else 1
    by_stage = [peak_memory(made, stage, pack, microbatches, shards, cluster.engine) for stage in range(layout.pp)]
    stage = max(range(layout.pp), key=lambda number: by_stage[number].total)
    batch = Batch(in_pack * data.sample_tokens / layout.cp, microbatches, work)
    time = step_time(made, batch, data_parallel, cluster.hardware, cluster.engine)
    return Plan(
        layout=layout,
        config=made,
        data_parallel=data_parallel,
        microbatches=microbatches,
        stage=stage,
        memory=by_stage[stage],
        time=time,
        tokens_per_gpu_second=work.tokens / time.total / cluster.gpus,
        tflops_per_gpu=passes(made) * forward_flops(made, work) / time.total / cluster.gpus / 1e12,
        reason=_why_not(by_stage[stage], layout, stage, cluster.gpu_memory_gb),
    )


def _why_not(memory: Memory, layout: Layout, stage: int, gpu_memory_gb: float) -> Optional[str]:
    missing = memory.total / GIB - gpu_memory_gb
    if missing <= 0:
        return None
    gib = {name: value / GIB for name, value in dataclasses.asdict(memory).items()}
    states = gib["parameters"] + gib["gradients"] + gib["optimizer"]
    where = f" on pipeline stage {stage}" if layout.pp > 1 else ""
    needs = f"needs {memory.total / GIB:.1f} of {gpu_memory_gb:g} GB{where}: "
    split = f"parameters {gib['parameters']:.1f}, gradients {gib['gradients']:.1f}, optimizer {gib['optimizer']:.1f}"
    if states > gpu_memory_gb - gib["overhead"]:
        return f"{needs}{split} alone leave too little. Raise TP or PP, or add data-parallel GPUs to share the optimizer."
    rest = gib["activations"] + gib["logits"] + gib["temporary"]
    remedy = "Lower mbs, raise TP or CP" + ("." if layout.recompute == "full" else ", or recompute=full.")
    return f"{needs}{split}, and {rest:.1f} for activations, logits and temporaries. {remedy}"


def candidates(config: Config, cluster: Cluster) -> Iterator[Layout]:
    """Every layout that can be built, without recomputation; tensor parallelism stays within a node."""
    gpus, layers = cluster.gpus, config.model.num_layers
    for tp in _divisors(min(gpus, cluster.hardware.gpus_per_node)):
        for pp in _divisors(layers):
            for cp in (1, 2, 4, 8):
                for vpp in _divisors(layers // pp) if pp > 1 else [1]:
                    for mbs in MICRO_BATCHES:
                        layout = Layout(tp, pp, vpp, cp, mbs)
                        if gpus >= layout.model_parallel and obstacle(config, layout, gpus) is None:
                            yield layout


def best_layouts(config: Config, cluster: Cluster, data: Data, count: int) -> list[Plan]:
    """The fastest layouts that fit, or, where none fits, those that miss by least.

    Layouts that do not fit are tried again with full recomputation.  Estimates within NEARLY of the fastest count as equal:
    then the simpler layout comes first.  Of layouts that differ in VPP, CP and micro-batch alone, the first is kept, so that
    the list shows different ways.

    Raises:
        ConfigError: no layout can be built.
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
            f"{obstacle(config, Layout(), cluster.gpus)}."
        )
    fitting = [plan for plan in plans if plan.fits]
    fastest = min((plan.time.total for plan in fitting), default=0.0)

    def rank(plan: Plan) -> tuple:
        layout = plan.layout
        return max(plan.time.total, NEARLY * fastest), layout.model_parallel, layout.pp, layout.vpp, plan.time.total

    ranked = sorted(fitting, key=rank) if fitting else sorted(plans, key=lambda plan: plan.memory.total)
    ways: dict[tuple, Plan] = {}
    for plan in ranked:
        ways.setdefault((plan.layout.tp, plan.layout.pp, plan.layout.recompute), plan)
    return list(ways.values())[:count]


def flags(plan: Plan, given: ModelConfig) -> list[str]:
    """The trainer's flags for a plan, to go with --data, --tokenizer-model and the run's length.

    `given` is the model as the user gave it, before the preset filled it in.
    """
    parallel, training = plan.config.parallel, plan.config.training
    found: list = []
    for field in dataclasses.fields(ModelConfig):
        value = getattr(given, field.name)
        if value != field.default:
            found += [f"--{field.name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    found += ["--objective", training.objective, "--seq-length", plan.config.data.seq_length]
    found += ["--tensor-model-parallel-size", plan.layout.tp, "--pipeline-model-parallel-size", plan.layout.pp]
    if plan.layout.vpp > 1:
        found += ["--num-layers-per-virtual-pipeline-stage", parallel.num_layers_per_virtual_pipeline_stage]
    found += ["--context-parallel-size", plan.layout.cp] if plan.layout.cp > 1 else []
    found += ["--sequence-parallel"] if parallel.sequence_parallel else []
    if parallel.use_distributed_optimizer:
        found += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    found += ["--micro-batch-size", plan.layout.mbs, "--global-batch-size", training.global_batch_size]
    found += ["--bf16"] if training.bf16 else []
    found += ["--fp8-format", training.fp8_format] if training.fp8_format else []
    found += ["--fp8-param-gather"] if training.fp8_param_gather else []
    found += ["--recompute-granularity", "full"] if plan.layout.recompute == "full" else []
    return [str(flag) for flag in found]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
