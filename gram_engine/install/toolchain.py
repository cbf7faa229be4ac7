"""Finds the compilers and GPUs of this machine. Only the standard library is imported: setup.py uses it as well."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Optional


def find_compiler() -> Optional[str]:
    """Path of a C++ compiler: $CXX, g++, c++ or clang++; None if there is none."""
    names = filter(None, [os.environ.get("CXX"), "g++", "c++", "clang++"])
    return next(filter(None, map(shutil.which, names)), None)


def cuda_home() -> Optional[Path]:
    """Folder of the CUDA toolkit, with bin/nvcc: $CUDA_HOME, that of the nvcc on the PATH, or /usr/local/cuda if $CUDA_HOME is
    not set; None if there is none. A folder with headers is preferred: an nvcc on the PATH may be a script outside the toolkit.
    """
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), Path(on_path).resolve().parents[1] if on_path else None]
    candidates += [] if candidates[0] else ["/usr/local/cuda"]
    found = [home for home in map(Path, filter(None, candidates)) if os.access(home / "bin" / "nvcc", os.X_OK)]
    return min(found, key=lambda home: not (home / "include" / "cuda_runtime.h").is_file(), default=None)


def find_nvcc() -> Optional[str]:
    """Path of nvcc: that of `cuda_home`, else whatever nvcc is on the PATH; None if there is none."""
    home = cuda_home()
    return str(home / "bin" / "nvcc") if home else shutil.which("nvcc")


def compute_capabilities() -> tuple[str, ...]:
    """Distinct compute capabilities of the GPUs, such as ("9.0",); empty if nvidia-smi is missing or fails."""
    text = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return tuple(sorted(set(re.findall(r"^\d+\.\d+$", text, re.MULTILINE))))


def first_match(pattern: str, command: list[str]) -> Optional[str]:
    """The first group of `pattern` in a command's standard output, or None."""
    match = re.search(pattern, output_of(command))
    return match[1] if match else None


def output_of(command: list[str]) -> str:
    """A command's standard output; empty if it cannot be started."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""
