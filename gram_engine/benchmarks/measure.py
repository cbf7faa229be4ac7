"""Time and peak memory of a function, and functions that run in fresh processes, so that their memory is theirs alone."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import torch
from torch import multiprocessing

from gram_engine.errors import GramError
from gram_engine.training.session import hush_known_warnings

M_MMAP_THRESHOLD = -3
SLOW_SECONDS = 5.0


class PeakMemory:
    """Context manager; afterwards `bytes` is the most memory in use at one time, minus what was in use at the start.

    On a GPU it is the memory of PyTorch's allocator. On a CPU it is the resident memory of this process, which includes the
    workspaces of libraries; None where the system does not report it (it does on Linux).

    Args:
        exact: on a CPU, return freed blocks to the system at once, which is slower. Without it the C library keeps small
            freed blocks, and allocations that reuse them are not seen.
    """

    def __init__(self, device: torch.device, exact: bool = True):
        self.device = device
        self.exact = exact
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            if self.exact:
                _keep_freed_memory(False)
            self._before = _reset_resident_peak()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif self._before is not None:
            self.bytes = max(0, _status_bytes("VmHWM") - self._before)
            if self.exact:
                _keep_freed_memory(True)


def _reset_resident_peak() -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _keep_freed_memory(keep: bool) -> None:
    """Whether glibc keeps freed blocks of up to 32 MiB; kept ones would hide allocations of the measured function."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20 if keep else 128 << 10)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(
    function: Callable[[], object],
    device: torch.device,
    repeats: int,
    budget_seconds: float,
    prepare: Callable[[], object] = lambda: None,
) -> tuple[float, int, int | None]:
    """(median seconds, number of timed calls, peak bytes) of calls to `function`.

    The first call is a warm-up and is not counted, unless it takes more than 5 seconds. No further call is timed once the
    timed calls have taken `budget_seconds` together. Peak memory is measured in one more call. `prepare` runs, untimed,
    before each call: it must free what the previous call left (such as gradients), or the peak would lack it.
    """

    def seconds() -> float:
        prepare()
        return _seconds(function, device)

    first = seconds()
    times = [first] if first > SLOW_SECONDS else [seconds()]
    while len(times) < repeats and sum(times) < budget_seconds:
        times.append(seconds())
    prepare()
    with PeakMemory(device) as peak:
        function()
    return statistics.median(times), len(times), peak.bytes


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_new_processes(function: Callable, *arguments: Any, count: int = 1, threads: int | None = None, hint: str = "") -> list:
    """The results of function(*arguments) in `count` new processes, in the order of their ranks.

    More than one have torchrun's environment variables, so that `function` can form a process group of them. The function,
    its arguments and its result must be picklable.

    Args:
        threads: CPU threads of each process; None: PyTorch's default.
        hint: a sentence for the error message.

    Raises:
        GramError: a process died.
    """
    context, port = multiprocessing.get_context("spawn"), _free_port()
    processes, receivers = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        variables |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        variables = variables if count > 1 else {}
        processes.append(context.Process(target=_send_result, args=(sender, variables, threads, function, arguments)))
        receivers.append(receiver)
        processes[-1].start()
        sender.close()
    try:
        return [receiver.recv() for receiver in receivers]
    except EOFError:
        for process in processes:
            process.kill()
        raise GramError(f"{function.__name__} died in a process of its own; its output is above. {hint}".strip()) from None
    finally:
        for process in processes:
            process.join()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def _send_result(sender, variables: dict[str, str], threads: int | None, function: Callable, arguments: tuple) -> None:
    hush_known_warnings()
    os.environ.update(variables)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    sender.send(function(*arguments))


def describe(device: torch.device) -> str:
    """The device's name; on a CPU also the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
