"""Package metadata, and the native kernels: those that this machine can build are built, the others are named.

Exact versions are in requirements.txt; the settings of ruff and pytest are in pyproject.toml.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path

from gram_engine.install.toolchain import find_compiler, find_nvcc  # noqa: E402

CUDA_ARCHITECTURES = "80;90a;100a"


def pinned(file: str) -> list[str]:
    """The requirements of a file, without comments."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def cpu_command(output: Path) -> tuple[list[str] | None, str]:
    """(command that builds the CPU kernels, "") or (None, what is missing)."""
    compiler, torch = find_compiler(), importlib.util.find_spec("torch")
    if compiler is None:
        return None, "no C++ compiler found. Install g++ 11 or newer (Debian, Ubuntu: apt-get install g++) and install again"
    if torch is None:
        return None, "torch is not importable while building. Install with: pip install --no-build-isolation ."
    home = Path(torch.origin).parent
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    paths = [f"-I{home / 'include'}", f"-I{ROOT / 'csrc'}", f"-L{home / 'lib'}"]
    return [compiler, *flags, *paths, str(ROOT / "csrc/cpu_ops.cpp"), "-o", str(output), "-ltorch_cpu", "-lc10"], ""


def cuda_command(output: Path) -> tuple[list[str] | None, str]:
    """(command that builds the CUDA kernels, "") or (None, what is missing). GRAM_CUDA_ARCHS chooses architectures."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None, "no nvcc found. Install the CUDA toolkit, or set CUDA_HOME, and install again"
    names = os.environ.get("GRAM_CUDA_ARCHS", CUDA_ARCHITECTURES).split(";")
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    newest = names[-1].rstrip("af")  # also as PTX, for newer GPUs
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    flags = ["-O3", "-std=c++20", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
    return [nvcc, *flags, *targets, str(ROOT / "csrc/pair_loss.cu"), "-o", str(output)], ""


class BuildKernels(build_ext):
    """Compiles csrc/ into gram_engine/kernels. A part that cannot be built is named, and the installation continues."""

    PARTS = (
        ("CPU kernels", "libgram_cpu.so", cpu_command, "CPU training uses the PyTorch reference, which is slower"),
        ("CUDA kernels", "libgram_cuda.so", cuda_command, "GPUs use the Triton kernels instead"),
    )

    def run(self) -> None:
        folder = ROOT if self.inplace else Path(self.build_lib)
        folder = folder / "gram_engine" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        for part, file, command_for, meaning in self.PARTS:
            unfinished = folder / f".{file}"
            command, missing = command_for(unfinished)
            if command is not None:
                self._say(f"{part}: {' '.join(command)}")
                done = subprocess.run(command, capture_output=True, text=True)
                self._say(done.stdout + done.stderr)
                missing = "" if done.returncode == 0 else f"{Path(command[0]).name} failed (its output is above)"
            if missing:
                unfinished.unlink(missing_ok=True)
                (folder / file).unlink(missing_ok=True)
                self._say(f"gram_engine: {part} not built: {missing}. Until then {meaning}.")
            else:
                unfinished.replace(folder / file)
                self._say(f"gram_engine: {part} built.")

    def _say(self, message: str) -> None:
        """Print, and append to $GRAM_BUILD_LOG if set: pip shows a build's output only with -v."""
        print(message, flush=True)
        if log := os.environ.get("GRAM_BUILD_LOG"):
            with open(log, "a", encoding="utf-8") as handle:
                handle.write(message + "\n")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    name="gram-engine",
    version="0.1.0",
    description="A training engine for generative foundation reward models (GRAM) on megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["gram_engine", "gram_engine.*"]),
    package_data={
        "gram_engine.data": ["templates/*.yaml"],
        "gram_engine.kernels": ["*.so"],
        "gram_engine.reproduce": ["*.yaml"],
    },
    # setuptools builds only if there is an extension; BuildKernels compiles its own list.
    ext_modules=[Extension("gram_engine.kernels.native", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    install_requires=pinned("requirements.txt"),
    extras_require={
        "dev": pinned("requirements-dev.txt"),
        # These compile on installation; `make gpu` sets this machine's headers and GPU architectures.
        "gpu": pinned("requirements-gpu.txt"),
        "wandb": ["wandb==0.31.0"],
        "hub": ["datasets==5.2.0"],
    },
    entry_points={"console_scripts": ["gram = gram_engine.cli:main"]},
)
