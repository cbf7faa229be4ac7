"""`make gpu`: compiles Transformer Engine and flash-attn against the installed torch, only for this machine's GPUs.

Both take long to compile and fail with errors that are hard to read, so everything that they need is checked first.
Only the standard library is imported; torch's version is read from its files, because torch may be the broken part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NoReturn, Optional

from gram_engine.errors import ConfigError
from gram_engine.install.pins import ROOT, pins
from gram_engine.install.toolchain import compute_capabilities, cuda_home, find_compiler, first_match

PIP = f"{sys.executable} -m pip"
REQUIREMENTS = "requirements-gpu.txt"
CUDA_MAJOR = "13"
"""Major version of CUDA that transformer-engine's extra core_cu13 is for."""
FLASH_ATTENTION_MAJORS = ("8", "9", "10", "12")
"""Major compute capabilities that flash-attn 2.8.3 compiles for, as 80, 90, 100 and 120, which run on all GPUs of the major."""
HEADERS = {
    "cuda_runtime_api.h": "cuda-toolkit[cudart]",
    "cublas_v2.h": "cuda-toolkit[cublas]",
    "cusparse.h": "cuda-toolkit[cusparse]",
    "cusolverDn.h": "cuda-toolkit[cusolver]",
    "nvrtc.h": "cuda-toolkit[nvrtc]",
    "nvtx3/nvToolsExt.h": "cuda-toolkit[nvtx]",
    "cudnn.h": "nvidia-cudnn-cu13",
    "nccl.h": "nvidia-nccl-cu13",
}
"""Header that the sources include -> package that provides it if the CUDA toolkit does not."""
CORE = ("transformer-engine-torch", f"transformer-engine-cu{CUDA_MAJOR}")
PARTS = {
    "transformer-engine": ("transformer_engine.pytorch", CORE, 30),
    "flash-attn": ("flash_attn", (), 140),
}
"""Package -> (module to import, packages that belong to it, minutes that one core needs to compile it)."""
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "psutil", "ninja", "pybind11")
GIB_PER_JOB = 9
"""Memory of one compiler process with a margin: flash-attn's backward kernel for heads of 128 was measured at 6 GiB."""
CPP20 = "#include <concepts>\n#include <span>\ntemplate <std::integral T> T one(std::span<T> x) { return x[0]; }\n"


@dataclass(frozen=True)
class Machine:
    """The parts of this machine that the builds depend on; None or empty if missing."""

    capabilities: tuple[str, ...]
    """Distinct compute capabilities of the GPUs, such as "9.0"."""
    torch: Optional[str]
    """torch's version."""
    torch_cuda: Optional[str]
    """CUDA version that torch was built for, such as "13.0"."""
    nvidia: Optional[Path]
    """Folder nvidia/ of NVIDIA's wheels, next to torch."""
    cuda_home: Optional[Path]
    """Folder of the CUDA toolkit, with bin/nvcc."""
    nvcc: Optional[str]
    """nvcc's version, such as "13.0"."""
    compiler: Optional[str]
    """Path of the C++ compiler."""

    def folders(self, kind: str) -> list[Path]:
        """Folders of NVIDIA's wheels called `kind` (include, lib)."""
        return sorted(self.nvidia.glob(f"*/{kind}")) if self.nvidia else []


def main(argv: list[str] | None = None) -> None:
    """Entry point of tools/install_gpu.sh."""
    parser = argparse.ArgumentParser(prog="install_gpu", description=__doc__)
    parser.add_argument("--check", action="store_true", help="check what the builds need, without building")
    options = parser.parse_args(argv)
    machine = inspect_machine()
    problems = [line for check in CHECKS for line in check(machine)]
    if problems:
        stop(*problems)
    missing = {name: version for name, version in pins(REQUIREMENTS).items() if installed(name) is None}
    if not missing:
        print("transformer-engine and flash-attn are installed and can be imported.")
        return
    added = environment(machine)
    print(announcement(machine, missing, int(added["MAX_JOBS"])))
    print(*(f"  {key}={value}" for key, value in added.items()), sep="\n", flush=True)
    if not options.check:
        build({**os.environ, **added})


def stop(*problems: str) -> NoReturn:
    """Print one line per problem and exit."""
    print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr, flush=True)
    raise SystemExit(ConfigError.exit_status)


def inspect_machine() -> Machine:
    """This machine, and torch as the running Python has it."""
    torch = importlib.util.find_spec("torch")
    version = runpy.run_path(str(Path(torch.origin).parent / "version.py")) if torch else {}
    home = cuda_home()
    return Machine(
        capabilities=compute_capabilities(),
        torch=version.get("__version__"),
        torch_cuda=version.get("cuda"),
        nvidia=Path(torch.origin).parents[1] / "nvidia" if torch else None,
        cuda_home=home,
        nvcc=first_match(r"release (\d+\.\d+)", [str(home / "bin" / "nvcc"), "--version"]) if home else None,
        compiler=find_compiler(),
    )


def check_gpu(machine: Machine) -> Iterator[str]:
    """There is a GPU, and flash-attn supports it."""
    if not machine.capabilities:
        yield "nvidia-smi finds no GPU here. Run this on the machine with the GPU, after its driver is installed."
    for capability in machine.capabilities:
        if capability.split(".")[0] not in FLASH_ATTENTION_MAJORS:
            known = ", ".join(f"{major}.x" for major in FLASH_ATTENTION_MAJORS)
            yield (
                f"a GPU of compute capability {capability}: flash-attn {pins(REQUIREMENTS)['flash-attn']} knows {known}. "
                "Train with --transformer-impl local there, which needs neither package."
            )


def check_torch(machine: Machine) -> Iterator[str]:
    """torch is the pinned version, built for CUDA."""
    pin = pins("requirements.txt")["torch"]
    again = f"{PIP} uninstall -y torch && {PIP} install --index-url https://pypi.org/simple -r requirements.txt"
    if machine.torch is None:
        yield f"torch is not installed: {PIP} install -r requirements.txt"
    elif machine.torch_cuda is None:
        yield f"torch {machine.torch} is a build without CUDA; PyPI's torch {pin} has it: {again}"
    elif machine.torch.split("+")[0] != pin:
        why = "; flash-attn is compiled as C++17, which torch 2.14 and later refuse" if _newer(machine.torch, "2.13") else ""
        yield f"torch {machine.torch} is installed, and both packages are compiled against torch {pin}{why}: {again}"
    elif machine.torch_cuda.split(".")[0] != CUDA_MAJOR:
        yield f"torch {machine.torch} is built for CUDA {machine.torch_cuda}, transformer-engine for {CUDA_MAJOR}: {again}"


def check_nvcc(machine: Machine) -> Iterator[str]:
    """nvcc has the major version of torch's CUDA and is not older."""
    wanted = machine.torch_cuda or f"{CUDA_MAJOR}.0"
    package = "cuda-toolkit-" + wanted.replace(".", "-")
    install = f"apt-get install {package} (from NVIDIA's repository), then CUDA_HOME=/usr/local/cuda-{wanted} make gpu"
    if machine.nvcc is None:
        yield f"no nvcc in $CUDA_HOME (if not set: /usr/local/cuda) or on the PATH; torch is built for CUDA {wanted}: {install}"
    elif machine.nvcc.split(".")[0] != wanted.split(".")[0]:
        yield f"nvcc {machine.nvcc} in {machine.cuda_home} is of another major version than torch's CUDA {wanted}: {install}"
    elif _numbers(machine.nvcc) < _numbers(wanted):
        yield f"nvcc {machine.nvcc} in {machine.cuda_home} is older than torch's CUDA {wanted}: {install}"


def check_headers(machine: Machine) -> Iterator[str]:
    """Every header is in the toolkit or in NVIDIA's wheels (which torch's build for CUDA brings along)."""
    if machine.torch_cuda is None:
        return
    folders = [*([machine.cuda_home / "include"] if machine.cuda_home else []), *machine.folders("include")]
    for header, package in HEADERS.items():
        if not any((folder / header).is_file() for folder in folders):
            wanted = _version_for_torch(package)
            options = "--force-reinstall" if "[" in package else "--force-reinstall --no-deps"
            yield f"{header} is neither in the CUDA toolkit nor in {machine.nvidia}: {PIP} install {options} '{wanted}'"


def check_compiler(machine: Machine) -> Iterator[str]:
    """There is a C++ compiler with C++20, which Transformer Engine's sources need."""
    if machine.compiler is None:
        yield "no C++ compiler (CXX, g++, c++, clang++): apt-get install g++"
        return
    command = [machine.compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=CPP20, capture_output=True, text=True).returncode != 0:
        version = first_match(r"(\d+[\d.]*)", [machine.compiler, "-dumpfullversion"]) or "of unknown version"
        install = "apt-get install g++-12, then CC=gcc-12 CXX=g++-12 make gpu"
        yield f"{machine.compiler} {version} does not compile C++20: {install}"


def check_installed(_: Machine) -> Iterator[str]:
    """Packages that are already installed have the versions for this Python's megatron-core and can be imported."""
    core = pins("requirements.txt")["megatron-core"]
    for name, wanted in pins(REQUIREMENTS).items():
        module, others, _ = PARTS[name]
        again = f"{PIP} uninstall -y {' '.join((name, *others))}, then make gpu"
        for part in (name, *others):
            if installed(part) not in (None, wanted):
                python = f"{sys.version_info.major}.{sys.version_info.minor}"
                yield f"{part} {installed(part)} is installed; megatron-core {core} (Python {python}) wants {wanted}: {again}"
        if installed(name) == wanted:
            done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
            if done.returncode != 0:
                why = (done.stderr.strip().splitlines() or ["no message"])[-1]
                yield f"{name} {wanted} is installed but cannot be imported ({why}): {again}"


CHECKS = (check_gpu, check_torch, check_nvcc, check_headers, check_compiler, check_installed)


def installed(name: str) -> Optional[str]:
    """Version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(machine: Machine) -> dict[str, str]:
    """Environment variables for the builds.

    TORCH_CUDA_ARCH_LIST is not among them: flash-attn sets its own architectures, and the part of Transformer Engine that is
    compiled here has no CUDA sources (its kernels come precompiled for every GPU; NVTE_CUDA_ARCHS only affects host code).
    NCCL's expert parallelism stays off: no model here has experts, and it needs newer NCCL headers than torch provides.
    """
    majors = sorted({int(capability.split(".")[0]) for capability in machine.capabilities})
    architectures = ";".join(f"{major}0" for major in majors)
    return {
        "CUDA_HOME": str(machine.cuda_home),
        "PATH": _joined([machine.cuda_home / "bin"], "PATH"),
        "CPATH": _joined(machine.folders("include"), "CPATH"),
        "LIBRARY_PATH": _joined(machine.folders("lib"), "LIBRARY_PATH"),
        "FLASH_ATTN_CUDA_ARCHS": architectures,
        "NVTE_CUDA_ARCHS": architectures,
        "NVTE_WITH_NCCL_EP": "0",
        "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "NVCC_THREADS": "1",
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(jobs(len(os.sched_getaffinity(0)), available_gib())),
    }


def jobs(cores: int, gib: float) -> int:
    """Number of compiler processes that fit on `cores` cores and into `gib` GiB of memory."""
    return max(1, min(cores, int(gib / GIB_PER_JOB)))


def available_gib(root: Path = Path("/")) -> float:
    """Available memory in GiB, at most the container's limit."""
    match = re.search(r"MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text())
    found = int(match[1]) / 2**20
    limit = root / "sys/fs/cgroup/memory.max"
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(found, int(text) / 2**30) if text.isdigit() else found


def announcement(machine: Machine, missing: dict[str, str], at_a_time: int) -> str:
    """What will be built, and roughly how long it takes."""
    minutes = sum(PARTS[name][2] for name in missing) / at_a_time
    names = " and ".join(f"{name} {version}" for name, version in missing.items())
    return (
        f"{names}, compiled against torch {machine.torch} for compute capability {', '.join(machine.capabilities)}: about "
        f"{max(5, round(minutes))} minutes with {at_a_time} compilers at a time (MAX_JOBS changes that), with:"
    )


def build(variables: dict[str, str]) -> None:
    """Compile and install both. pip's cached wheels of earlier builds are not used: they may be for another torch."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--constraint", "requirements.txt"]
    for arguments in (BUILD_TOOLS, ["--no-build-isolation", "--no-cache-dir", "-r", REQUIREMENTS]):
        done = subprocess.run([*pip, *arguments], cwd=ROOT, env=variables)
        if done.returncode != 0:
            stop("pip failed (its output is above). Was a compiler killed, for memory? Fewer at a time: MAX_JOBS=1 make gpu")
    for name in PARTS:
        subprocess.run([sys.executable, "-c", f"import {PARTS[name][0]}"], check=True)
    print("transformer-engine and flash-attn are ready.")


def _version_for_torch(package: str) -> str:
    """`package` pinned to the version that the installed torch requires, if torch's metadata names one."""
    name = package.split("[")[0]
    for requirement in (importlib.metadata.requires("torch") or []) if installed("torch") else []:
        if match := re.match(rf"{name}(?:\[[\w,]+\])?==([\w.]+)", requirement):
            return f"{package}=={match[1]}"
    return package


def _newer(version: str, than: str) -> bool:
    return _numbers(version)[:2] > _numbers(than)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])))


def _joined(folders: list[Path], variable: str) -> str:
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(variable)])])


if __name__ == "__main__":
    main()
