"""`gram plan`: memory and step time of a model's layouts on a number of GPUs, and the trainer's flags for the best."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Iterator, Literal, Optional

import tyro

from gram_engine.config.parse import fail
from gram_engine.config.schema import Config, ModelConfig
from gram_engine.config.task import ObjectiveName
from gram_engine.config.validate import lora_rules, refuse
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import write_atomically
from gram_engine.model.shapes import resolve_shape
from gram_engine.planning.layouts import Cluster, Data, Plan, best_layouts, evaluate, flags, parse_layout
from gram_engine.planning.memory import GIB, GPU
from gram_engine.planning.timing import Hardware


@dataclass
class PlanArguments:
    """Find the parallel layouts of a model that fit on the GPUs, with their speed and the trainer's flags."""

    gpus: int
    """Number of GPUs."""
    shape: ModelConfig = field(default_factory=ModelConfig)
    gpu_memory_gb: float = 80.0
    """Memory of one GPU as its vendor states it (80: H100, 141: H200), counted in GiB."""
    objective: ObjectiveName = "pair-preference"
    """Stage 1 (response-lm), stage 2 (pair-preference), or the discriminative baseline (bradley-terry)."""
    seq_length: int = 2048
    """Maximum tokens of one sample, or of each of bradley-terry's two sequences."""
    sample_tokens: Optional[float] = None
    """Mean tokens of a sample (bradley-terry: of its two sequences together); default: the maximum that --seq-length allows."""
    response_fraction: float = 1.0
    """Stage 1: fraction of a sample's tokens that carries loss."""
    global_batch_size: int = 32
    """Samples per step, over all GPUs."""
    bf16: bool = True
    """Train in bfloat16 with fp32 main parameters; --no-bf16: in fp32."""
    fp8_format: Optional[Literal["e4m3", "hybrid"]] = None
    """Compute the layers' matrix products in FP8; see the trainer's flag of the same name."""
    layout: Optional[str] = None
    """Evaluate only this layout, e.g. "tp=4 pp=8 vpp=5 cp=1 mbs=1 recompute=full"; sizes left out are 1, recompute is none."""
    top: int = 5
    """Number of layouts to show."""
    hardware: Hardware = field(default_factory=Hardware)
    json_file: Annotated[Optional[str], tyro.conf.arg(name="json")] = None
    """Also write the plans to this file."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `gram plan`."""
    arguments = tyro.cli(PlanArguments, args=argv, prog="gram plan", config=(tyro.conf.OmitArgPrefixes,))
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
        ConfigError: a value is out of range, the model's shape is incomplete, or the layout is not feasible.
    """
    refuse(_range_rules(arguments))
    config = configuration(arguments)
    most = config.task.sequences_per_sample * arguments.seq_length
    sample_tokens = arguments.sample_tokens or float(most)
    if sample_tokens > most:
        raise ConfigError(f"--sample-tokens {sample_tokens:g} is more than the {most} that --seq-length allows.")
    engine = dataclasses.replace(GPU, local_layers=arguments.shape.transformer_impl == "local")
    cluster = Cluster(arguments.gpus, arguments.gpu_memory_gb, arguments.hardware, engine)
    data = Data(sample_tokens, arguments.response_fraction)
    if arguments.layout is not None:
        return [evaluate(config, parse_layout(arguments.layout), cluster, data)]
    return best_layouts(config, cluster, data, arguments.top)


def _range_rules(arguments: PlanArguments) -> Iterator[tuple[bool, str]]:
    names = ("gpus", "gpu_memory_gb", "seq_length", "sample_tokens", "global_batch_size", "top")
    numbers = {name: getattr(arguments, name) for name in names} | dataclasses.asdict(arguments.hardware)
    fractions = {"response_fraction": arguments.response_fraction, "overlap": numbers.pop("overlap")}
    for name, value in numbers.items():
        yield value is not None and value <= 0, f"--{name.replace('_', '-')} {value} must be positive."
    for name, value in fractions.items():
        yield not 0 <= value <= 1, f"--{name.replace('_', '-')} {value} must be in [0, 1]."


def configuration(arguments: PlanArguments) -> Config:
    """The trainer's configuration for the model and the objective, its shape resolved, without a layout."""
    config = Config(model=copy.deepcopy(arguments.shape))
    config.data.seq_length = arguments.seq_length
    config.training.objective = arguments.objective
    config.training.global_batch_size = arguments.global_batch_size
    config.training.bf16, config.training.fp8_format = arguments.bf16, arguments.fp8_format
    if arguments.fp8_format and not arguments.bf16:
        raise ConfigError("--fp8-format needs --bf16.")
    resolve_shape(config)
    refuse(lora_rules(config))
    if config.model.vocab_size is None:
        raise ConfigError("The vocabulary's size is open: give --vocab-size.")
    return config


def report(plans: list[Plan], arguments: PlanArguments) -> str:
    """The assumptions, tables of memory and time, and the trainer's flags for the first plan."""
    lines, best = _heading(arguments), plans[0]
    if not best.fits and arguments.layout is None:
        lines += ["NO LAYOUT FITS; those that need the least memory:", ""]
    lines += ["Memory of the fullest GPU, GB:", _row("layout", *_MEMORY, "total", "fits")]
    for plan in plans:
        sizes = [f"{size / GIB:.1f}" for size in (*asdict(plan.memory).values(), plan.memory.total)]
        lines += [_row(_short(plan), *sizes, "yes" if plan.fits else "no")]
    lines += ["", "One step, seconds (MFU of the bf16 peak):", _row("layout", *_TIME, "total", "tok/s/GPU", "MFU")]
    for plan in plans:
        seconds = [f"{value:.3f}" for value in (*asdict(plan.time).values(), plan.time.total)]
        mfu = plan.tflops_per_gpu / arguments.hardware.peak_tflops
        lines += [_row(_short(plan), *seconds, f"{plan.tokens_per_gpu_second:,.0f}", f"{mfu:.1%}")]
    if best.fits:
        lines += ["", f"Flags of {best.layout} (DP {best.dims.data_parallel_size}):", "  " + _joined(best, arguments)]
    else:
        lines += ["", f"{best.layout}: does not fit: {best.reason}"]
    return "\n".join(lines)


ERROR = (
    "memory within 3 % on CPU layouts of stages 1 and 2 (gram benchmark planner), not measured on GPUs; "
    "tokens/s 7 % to 26 % below published FP8 runs."
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
        f"fragmentation (other); GB are GiB; {hardware.efficiency:.0%} of {hardware.peak_tflops:g} TFLOP/s in matrix products;",
        f"NVLink {hardware.nvlink_gb_s:g} GB/s in nodes of {hardware.gpus_per_node}, network {hardware.network_gb_s:g} GB/s a "
        f"GPU; {hardware.overlap:.0%} of DP communication hidden, TP and CP communication not; FP8 {hardware.fp8_gain:g} times "
        "as fast.",
        f"error: {ERROR}",
        "",
    ]


def _short(plan: Plan) -> str:
    layout = plan.layout
    text = f"TP{layout.tp} PP{layout.pp} VPP{layout.vpp} CP{layout.cp} DP{plan.dims.data_parallel_size} MBS{layout.mbs}"
    return text + (" recompute" if layout.recompute == "full" else "")


def _row(name: str, *cells: str) -> str:
    return f"  {name:38}" + "".join(f"{cell:>10}" for cell in cells)


def _joined(plan: Plan, arguments: PlanArguments) -> str:
    text = ""
    for part in flags(plan, arguments.shape):
        text += f" \\\n  {part}" if text and part.startswith("--") else f" {part}" if text else part
    return text


def as_dict(plan: Plan, given: ModelConfig) -> dict:
    """A plan as JSON: sizes in bytes, times in seconds, the trainer's flags."""
    return {
        "layout": {**asdict(plan.layout), "dp": plan.dims.data_parallel_size},
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
