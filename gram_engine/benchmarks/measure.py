"""Time and peak memory of a function, as rows of a table and of a JSON file."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable

import torch

from gram_engine.files import write_atomically

MEMORY_FLOOR = 1 << 20
"""Bytes; less than this cannot be told apart on a CPU, so smaller peaks count as this much in ratios."""
M_MMAP_THRESHOLD = -3
SLOW_SECONDS = 5.0


@dataclass
class Row:
    """One measurement. Ratios: the baseline's figure divided by this one's (above 1: faster, smaller)."""

    benchmark: str
    name: str
    shape: dict[str, int]
    dtype: str
    device: str
    median_ms: float
    repeats: int
    peak_bytes: int | None
    baseline: str
    time_ratio: float | None = None
    memory_ratio: float | None = None
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)


class PeakMemory:
    """Most bytes in use at one time beyond those in use at the start: the GPU allocator's, or this process's resident
    memory (Linux; None elsewhere).  The latter includes the libraries' workspaces.

    Args:
        exact: CPU: hand freed blocks back at once, which is slower; else small freed blocks stay and are reused.
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
    """glibc: whether freed blocks up to 32 MiB stay with the process; kept ones would hide a function's allocations."""
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
    """(median seconds, repeats, peak bytes) of calls to `function`.

    The first call warms up and does not count, unless it took more than 5 seconds.  Timed calls end early once they took
    `budget_seconds`.  The peak is that of one more call.  `prepare` runs before each call and does not count: it must free
    what the call before left, which would else be missing in the peak.
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


def add_ratios(rows: list[Row]) -> None:
    """Fill the ratios of rows of one benchmark from the row that is named as their baseline."""
    by_name = {row.name: row for row in rows}
    for row in rows:
        base = by_name.get(row.baseline)
        if base is None:
            continue
        row.time_ratio = base.median_ms / row.median_ms
        if row.peak_bytes is not None and base.peak_bytes is not None:
            row.memory_ratio = max(base.peak_bytes, MEMORY_FLOOR) / max(row.peak_bytes, MEMORY_FLOOR)


def table(rows: list[Row]) -> str:
    """The rows as text, a heading for each benchmark and shape."""
    lines: list[str] = []
    heading = None
    for row in rows:
        shape = ", ".join(f"{name} {value:,}" for name, value in row.shape.items())
        if (row.benchmark, shape, row.dtype) != heading:
            heading = (row.benchmark, shape, row.dtype)
            lines += ["", f"{row.benchmark}: {shape}, {row.dtype}, {row.device} (ratios to {row.baseline})"]
            lines += [f"  {'':44}{'median':>13}{'peak memory':>14}{'speed':>10}{'memory':>10}"]
        memory = "-" if row.peak_bytes is None else _bytes(row.peak_bytes)
        lines += [
            f"  {row.name:44}{_time(row.median_ms):>13}{memory:>14}{_ratio(row.time_ratio):>10}{_ratio(row.memory_ratio):>10}"
            f"{'  ' + row.note if row.note else ''}"
        ]
    return "\n".join(lines[1:])


def _time(milliseconds: float) -> str:
    return f"{milliseconds:,.3f} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"


def _bytes(count: int) -> str:
    return "< 1 MiB" if count < MEMORY_FLOOR else f"{count / 2**20:,.0f} MiB"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:,.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def write_json(path: str | Path, rows: list, **more: Any) -> None:
    """The rows (dataclasses) with date, command and versions, and what else there is to keep."""
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        **more,
    }
    with write_atomically(path) as handle:
        json.dump(content, handle, indent=1)


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter for speed, where installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for package in ("megatron-core", "triton", "transformer-engine", "flash-attn", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(device: torch.device) -> str:
    """The device's name, with threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"
