"""Published Megatron runs that the planner is compared with: layouts that are known to fit, and their speed.

Sources: NVIDIA/Megatron-LM, examples/llama/README.md ("FP8 Performance", Llama-3 on H100) and its script
train_llama3_8b_h100_fp8.sh; NVIDIA-NeMo/Megatron-Bridge, performance summary 26.06 (SFT of Llama-3 70B on H100) and
scripts/performance/configs/llama/llama3_llm_finetune.py.

They train in FP8 (--fp8-param-gather: two 8-bit copies of the weights, one transposed) and reduce gradients in bf16, which
this engine does not do; `as_published` counts both.  Its speed uses the FP8 speedup of `Hardware`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gram_engine.config.schema import Config
from gram_engine.model.shapes import resolve_shape
from gram_engine.planning.layouts import Cluster, Data, Layout, Plan, evaluate
from gram_engine.planning.memory import GPU, Engine


@dataclass(frozen=True)
class Run:
    """A published run on H100 GPUs of 80 GB."""

    name: str
    model: str
    gpus: int
    seq_length: int
    global_batch_size: int
    layout: Layout
    tokens_per_gpu_second: float


RUNS = (
    Run("Megatron-LM 8B", "llama-3.1-8b", 8, 8192, 128, Layout(cp=2), 13812),
    Run("Megatron-LM 70B", "llama-3.1-70b", 64, 8192, 128, Layout(tp=4, pp=8, vpp=5), 1621),
    Run("Bridge 70B SFT, packed", "llama-3.1-70b", 32, 4096, 32, Layout(tp=4, pp=4, vpp=5), 1638),
)


def as_published(run: Run) -> Plan:
    """The plan of the run in its own precision."""
    return _plan(run, replace(GPU, gradient_bytes=2), run.layout, fp8=True)


def as_this_engine(run: Run, fp8: bool = False, recompute: str = "none") -> Plan:
    """The plan of the run's layout in this engine, which reduces gradients in fp32."""
    return _plan(run, GPU, replace(run.layout, recompute=recompute), fp8)


def _plan(run: Run, engine: Engine, layout: Layout, fp8: bool) -> Plan:
    config = Config()
    config.model.model, config.data.seq_length = run.model, run.seq_length
    config.training.objective, config.training.bf16 = "response-lm", True
    config.training.fp8_format = "hybrid" if fp8 else None
    config.training.global_batch_size = run.global_batch_size
    resolve_shape(config)
    return evaluate(config, layout, Cluster(run.gpus, 80.0, engine=engine), Data(run.seq_length))
