"""The device that this process computes on: CUDA with NCCL, or a CPU with gloo.  Only this package tells them apart."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from gram_engine.errors import ConfigError
from gram_engine.platform.cpu import CPU, answer_cuda_calls
from gram_engine.platform.environment import local_rank
from gram_engine.platform.stack import adapt_megatron, installed_stack

# Dense bf16 peak of one GPU in TFLOP/s, from NVIDIA's data sheets; the key is part of the device's name.
PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0}


@dataclass(frozen=True)
class Platform:
    """The device of this process and the backend of its process groups."""

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def use_in_this_thread(self) -> None:
        """Make the device the current one of the calling thread; CUDA's default in a new thread is device 0."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)

    def memory_allocated_bytes(self) -> int:
        """Peak memory of the GPU's allocator, or the resident memory of this process on a CPU."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else psutil.Process().memory_info().rss

    def peak_tflops(self) -> float | None:
        """Dense bf16 peak of the device; None if it is unknown, as for CPUs."""
        return next((peak for part, peak in PEAK_TFLOPS.items() if part in self.name()), None)

    def name(self) -> str:
        """Name of the GPU model, or "CPU"."""
        return torch.cuda.get_device_name(self.device) if self.is_cuda else "CPU"

    def compute_capability(self) -> tuple[int, int]:
        """(major, minor) compute capability of the GPU; (0, 0) for a CPU."""
        return torch.cuda.get_device_capability(self.device) if self.is_cuda else (0, 0)

    def synchronize(self) -> None:
        """Wait until the device has finished all work that was queued."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def describe(self) -> str:
        """One line for the log."""
        threads = "" if self.is_cuda else f", {torch.get_num_threads()} threads"
        return f"{self.name()}{threads} | {self.backend} | torch {torch.__version__}"


def default_device() -> torch.device:
    """The device for a model that runs without megatron-core: a GPU if torch can use one, another for each process of this
    machine; else the CPU.
    """
    if not torch.cuda.is_available():
        return CPU
    torch.cuda.set_device(local_rank() % gpu_count())
    return torch.device("cuda", torch.cuda.current_device())


def gpu_count() -> int:
    """Number of GPUs of this machine that torch can use."""
    return torch.cuda.device_count()


@functools.cache
def initialise(device: Literal["auto", "cuda", "cpu"] = "auto") -> Platform:
    """Choose the device of this process and prepare megatron-core for it.  Call it before megatron-core is used.

    Raises:
        ConfigError: the release of megatron-core is not supported; cuda was requested and there is none, or cpu on a machine
            with GPUs; the machine has a GPU that this build of torch cannot use.
    """
    installed_stack()
    if device != "cpu":
        _set_gpu_environment()
    available = torch.cuda.is_available()
    if not available and device != "cpu":
        _refuse_torch_without_cuda(device)
    if device == "cuda" and not available:
        raise ConfigError("--device cuda: torch finds no GPU. Use --device cpu, or check the driver and torch's build.")
    if available and device == "cpu":
        # megatron-core and torch check in many places whether there is a GPU; all of them must get the same answer.
        raise ConfigError("--device cpu on a machine with GPUs: hide them instead, with CUDA_VISIBLE_DEVICES= (empty).")
    platform = _start_gpu() if available else _start_cpu()
    adapt_megatron()
    return platform


def make_deterministic() -> None:
    """Allow only kernels that give the same bits in every run.  Call it before the device is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)


def _set_gpu_environment() -> None:
    """Set variables that the driver and torch's allocator read when they start, hence before the first CUDA call."""
    # One hardware queue: kernels start in the order of the launches, which megatron-core's overlap of communication needs.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # Packs and label rows differ in size from step to step, which fragments segments of fixed size.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _refuse_torch_without_cuda(device: str) -> None:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None and not hidden and _has_nvidia_gpu():
        version = torch.__version__.partition("+")[0]
        raise ConfigError(
            f"--device {device}: this machine has an NVIDIA GPU, but torch {torch.__version__} was built without CUDA. Run: "
            f"pip install --force-reinstall --index-url https://pypi.org/simple torch=={version}, or train with --device cpu."
        )


def _has_nvidia_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _start_gpu() -> Platform:
    local = local_rank()
    torch.cuda.set_device(local)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention builds a new plan for every shape, and packs differ
    return Platform(torch.device("cuda", local), "nccl")


def _start_cpu() -> Platform:
    if "OMP_NUM_THREADS" not in os.environ:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, share))
    answer_cuda_calls()
    return Platform(CPU, "gloo")
