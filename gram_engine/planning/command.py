"""`tools/plan.py`: memory and step time of a model's layouts on a number of GPUs, and the flags of the best."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal, Optional

import tyro

from gram_engine.config.parse import fail
from gram_engine.config.schema import Config, ModelConfig
from gram_engine.config.task import ObjectiveName
from gram_engine.config.validate import check_lora
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import write_atomically
from gram_engine.model.shapes import resolve_shape
from gram_engine.planning.layouts import Cluster, Data, Plan, best_layouts, evaluate, flags, parse_layout
from gram_engine.planning.memory import GIB, GPU, Memory
from gram_engine.planning.timing import Hardware, StepTime


@dataclass
class PlanArguments:
    """Which layouts of a model fit on the GPUs, how fast they would be, and the flags to paste."""

    gpus: int
    """Number of GPUs."""
    shape: ModelConfig = field(default_factory=ModelConfig)
    gpu_memory_gb: float = 80.0
    """Memory of one GPU as its vendor states it (80: H100, 141: H200), counted in GiB."""
    objective: ObjectiveName = "pair-preference"
    """Stage 1 (response-lm), stage 2 (pair-preference), or the discriminative baseline (bradley-terry)."""
    seq_length: int = 2048
    """Most tokens in one sample, or in each of bradley-terry's two texts."""
    sample_tokens: Optional[float] = None
    """Mean tokens of a sample, of bradley-terry's two texts together; default: the most that --seq-length allows."""
    response_fraction: float = 1.0
    """Stage 1: part of a sample's tokens that carries loss."""
    global_batch_size: int = 32
    """Samples per step, over all GPUs."""
    bf16: bool = True
    """Train in bfloat16 with fp32 main parameters; --no-bf16: in fp32."""
    fp8_format: Optional[Literal["e4m3", "hybrid"]] = None
    """Matrix products of the layers in FP8, as the trainer's flag."""
    layout: Optional[str] = None
    """Work out this layout alone, e.g. "tp=4 pp=8 vpp=5 cp=1 mbs=1 recompute=full" (what is left out is 1, and none)."""
    top: int = 5
    """Layouts to show."""
    hardware: Hardware = field(default_factory=Hardware)
    json_file: Annotated[Optional[str], tyro.conf.arg(name="json")] = None
    """Also write the plans to this file."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/plan.py."""
    arguments = tyro.cli(PlanArguments, args=argv, prog="plan", config=(tyro.conf.OmitArgPrefixes,))
    try:
        plans = make_plans(arguments)
    except GramError as error:
        fail(error)
    print(report(plans, arguments))
    if arguments.json_file:
        with write_atomically(arguments.json_file) as handle:
            json.dump([as_dict(plan, arguments.shape) for plan in plans], handle, indent=1)


def make_plans(arguments: PlanArguments) -> list[Plan]:
    """The layout asked for, or the best ones.

    Raises:
        ConfigError: a value out of range, an open shape, or a layout that cannot be built.
    """
    positive = ("gpus", "gpu_memory_gb", "seq_length", "global_batch_size", "top")
    for name in (*positive, *(["sample_tokens"] if arguments.sample_tokens is not None else [])):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be positive.")
    hardware = arguments.hardware
    for speed in dataclasses.fields(hardware):
        if speed.name != "overlap" and getattr(hardware, speed.name) <= 0:
            raise ConfigError(f"--{speed.name.replace('_', '-')} {getattr(hardware, speed.name)} must be positive.")
    for name, value in (("response-fraction", arguments.response_fraction), ("overlap", hardware.overlap)):
        if not 0 <= value <= 1:
            raise ConfigError(f"--{name} {value} must be in [0, 1].")
    config = configuration(arguments)
    most = config.task.sequences_per_sample * arguments.seq_length
    sample_tokens = arguments.sample_tokens or float(most)
    if sample_tokens > most:
        raise ConfigError(f"--sample-tokens {sample_tokens:g} is more than the {most} that --seq-length allows.")
    engine = dataclasses.replace(GPU, local_layers=arguments.shape.transformer_impl == "local")
    cluster = Cluster(arguments.gpus, arguments.gpu_memory_gb, hardware, engine)
    data = Data(sample_tokens, arguments.response_fraction)
    if arguments.layout is not None:
        return [evaluate(config, parse_layout(arguments.layout), cluster, data)]
    return best_layouts(config, cluster, data, arguments.top)


def configuration(arguments: PlanArguments) -> Config:
    """The trainer's resolved configuration, without a layout."""
    config = Config(model=copy.deepcopy(arguments.shape))
    config.data.seq_length = arguments.seq_length
    config.training.objective = arguments.objective
    config.training.global_batch_size = arguments.global_batch_size
    config.training.bf16, config.training.fp8_format = arguments.bf16, arguments.fp8_format
    if arguments.fp8_format and not arguments.bf16:
        raise ConfigError("--fp8-format needs --bf16.")
    resolve_shape(config)
    for wrong, message in check_lora(config):
        if wrong:
            raise ConfigError(message)
    if config.model.vocab_size is None:
        raise ConfigError("The vocabulary's size is open: give --vocab-size.")
    return config


def report(plans: list[Plan], arguments: PlanArguments) -> str:
    """Tables of memory and time, the assumptions, and the first plan's flags."""
    lines = _heading(arguments)
    if not plans[0].fits and arguments.layout is None:
        lines += ["NO LAYOUT FITS; the nearest are:", ""]
    lines += ["Memory of the fullest GPU, GB:", _row("layout", *_MEMORY, "total", "fits")]
    for plan in plans:
        sizes = [f"{getattr(plan.memory, name) / GIB:.1f}" for name in _kinds(Memory)]
        lines += [_row(_short(plan), *sizes, f"{plan.memory.total / GIB:.1f}", "yes" if plan.fits else "no")]
    lines += ["", "One step, seconds (MFU of the bf16 peak):", _row("layout", *_TIME, "total", "tok/s/GPU", "MFU")]
    peak = arguments.hardware.peak_tflops
    for plan in plans:
        seconds = [f"{getattr(plan.time, name):.3f}" for name in _kinds(StepTime)]
        speed = [f"{plan.time.total:.3f}", f"{plan.tokens_per_gpu_second:,.0f}", f"{plan.tflops_per_gpu / peak:.1%}"]
        lines += [_row(_short(plan), *seconds, *speed)]
    if not plans[0].fits:
        lines += ["", f"{plans[0].layout}: does not fit: {plans[0].reason}"]
    else:
        lines += ["", f"Flags of {plans[0].layout} (DP {plans[0].data_parallel}):", "  " + _joined(plans[0], arguments)]
    return "\n".join(lines)


ERROR = (
    "of memory, at most 3 % on CPU layouts of stages 1 and 2 (gram benchmark planner), not measured on GPUs; "
    "of tokens/s, -7 % to -26 % against published FP8 runs."
)
_MEMORY = ("param", "grad", "optim", "activ", "logits", "temp", "other")
_TIME = ("compute", "bubble", "TP", "CP", "PP", "DP", "optim")


def _heading(arguments: PlanArguments) -> list[str]:
    hardware, engine = arguments.hardware, GPU
    precision = "fp32" if not arguments.bf16 else "bf16" if not arguments.fp8_format else "FP8"
    name = arguments.shape.model or arguments.shape.load_hf or "the model"
    return [
        f"{name}, {arguments.objective}, {arguments.gpus} GPUs of {arguments.gpu_memory_gb:g} GB, --seq-length "
        f"{arguments.seq_length}, --global-batch-size {arguments.global_batch_size}, {precision}",
        f"assumed: {engine.overhead_bytes / GIB:g} GB + {engine.overhead_fraction:.0%} of all tensors for CUDA, NCCL and "
        f"fragmentation (other); GB are GiB; {hardware.efficiency:.0%} of {hardware.peak_tflops:g} TFLOP/s while computing;",
        f"NVLink {hardware.nvlink_gb_s:g} GB/s in nodes of {hardware.gpus_per_node}, network {hardware.network_gb_s:g} GB/s a "
        f"GPU; {hardware.overlap:.0%} of DP communication hidden, TP and CP communication not; FP8 {hardware.fp8_gain:g} times "
        "as fast.",
        f"error: {ERROR}",
        "",
    ]


def _kinds(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _short(plan: Plan) -> str:
    layout = plan.layout
    text = f"TP{layout.tp} PP{layout.pp} VPP{layout.vpp} CP{layout.cp} DP{plan.data_parallel} MBS{layout.mbs}"
    return text + (" recompute" if layout.recompute == "full" else "")


def _row(name: str, *cells: str) -> str:
    return f"  {name:38}" + "".join(f"{cell:>10}" for cell in cells)


def _joined(plan: Plan, arguments: PlanArguments) -> str:
    text = ""
    for part in flags(plan, arguments.shape):
        text += f" \\\n  {part}" if text and part.startswith("--") else f" {part}" if text else part
    return text


def as_dict(plan: Plan, given: ModelConfig) -> dict:
    """A plan for machines: bytes, seconds, flags."""
    return {
        "layout": {**asdict(plan.layout), "dp": plan.data_parallel},
        "microbatches": plan.microbatches,
        "fits": plan.fits,
        "reason": plan.reason,
        "pipeline_stage": plan.stage,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "seconds": {**asdict(plan.time), "total": plan.time.total},
        "tokens_per_gpu_second": plan.tokens_per_gpu_second,
        "tflops_per_gpu": plan.tflops_per_gpu,
        "flags": flags(plan, given),
    }
