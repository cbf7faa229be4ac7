"""tools/gpu_check.sh --offline: the GPU tests and benchmarks on a machine that has torch and a GPU, but no package index.

Nothing is installed into the machine's Python. Packages that it lacks come as wheels in the folder .whl, which is copied along
with the checkout; for that reason Git does not ignore it (tests/test_install.py fails if it is committed). This module imports
only the standard library.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gram_engine.install.gpu import installed, stop
from gram_engine.install.pins import PYTHONS, ROOT, pins
from gram_engine.install.toolchain import compute_capabilities

WHEELS = Path(os.environ.get("WHEELS", ROOT / ".whl"))
CARRIED = ("megatron-core", "tyro", "docstring-parser", "typeguard")
"""Packages that a machine for deep learning usually lacks; --fetch-wheels takes more names."""
FURTHER = ("pytest", "pytest-timeout", "triton", "setuptools", "docstring-parser", "typeguard")
"""Packages needed in addition to requirements.txt."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
VERSION = sys.version.split()[0]
FETCH = "tools/gpu_check.sh --offline --fetch-wheels"


def main(argv: list[str] | None = None) -> None:
    """Fetch the wheels; or check this machine, build the kernels, and become gpu_check with the remaining arguments."""
    parser = argparse.ArgumentParser(prog="gpu_check --offline", description=__doc__, allow_abbrev=False)
    parser.add_argument("--fetch-wheels", nargs="*", metavar="PACKAGE", help="where pip works: download wheels, also PACKAGE's")
    parser.add_argument("--python", default="3.12", help="with --fetch-wheels: version of the other machine's Python")
    options, left = parser.parse_known_args(argv)
    if options.fetch_wheels is not None:
        if left:
            parser.error(f"--fetch-wheels takes names of packages and --python: {' '.join(left)}")
        fetch(options.python, options.fetch_wheels)
        return
    if sys.version_info[:2] not in PYTHONS:
        stop(f"Python {VERSION} ({sys.executable}): 3.11, 3.12 or 3.13 is needed. Name one: PYTHON=python3.12")
    site = Path(tempfile.gettempdir()) / "gram-site"
    add_wheels(site)
    if problem := refusal():
        stop(problem)
    build_kernels(site)
    arguments = ["-m", "gram_engine.benchmarks.gpu_check", "--offline", *left]
    os.execve(sys.executable, [sys.executable, *arguments], environment(site))


def fetch(python: str, further: list[str]) -> None:
    """Download wheels for Linux on x86-64 and that version of Python; pinned packages in their pinned version."""
    version = tuple(map(int, re.findall(r"\d+", python)))[:2]
    if version not in PYTHONS:
        stop(f"--python {python}: there are pins for {', '.join(f'3.{minor}' for _, minor in PYTHONS)}.")
    versions = {**pins("requirements.txt", version), **pins("requirements-dev.txt", version)}
    names = [f"{name}=={versions[name]}" if name in versions else name for name in (*CARRIED, *further)]
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    target = ["--only-binary=:all:", "--no-deps", "--python-version", f"3.{version[1]}", "--implementation", "cp", *platforms]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", *target, "-d", str(WHEELS), *names]
    if subprocess.run(command).returncode != 0:
        stop(f"pip could not download {' '.join(names)} (its output is above).")
    print(f"{WHEELS}: {', '.join(sorted(path.name for path in WHEELS.glob('*.whl')))}")
    print("Copy this folder with the checkout (Git does not ignore it; do not commit it), then: tools/gpu_check.sh --offline")


def add_wheels(site: Path) -> None:
    """Unpack the wheels into the folder `site`, and let this process import from it."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        quiet = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        if subprocess.run([*pip, *quiet, *wheels]).returncode != 0:
            stop(f"the wheels in {WHEELS} do not fit this Python {VERSION}: rm -r {WHEELS}, then {_fetch_again()}")
    sys.path.insert(0, str(site))


def refusal() -> str | None:
    """Why the tests cannot run here, with everything that is missing; None: they can."""
    needed = (*pins("requirements.txt"), *FURTHER)
    lacking = [name for name in needed if installed(name) is None]
    if lacking:
        further = [name for name in lacking if name not in CARRIED]
        return (
            f"Python {VERSION} ({sys.executable}) lacks {', '.join(lacking)}. Where pip works: "
            f"{_fetch_again(further)}; then copy .whl here, with the checkout."
        )
    if not compute_capabilities():
        return "nvidia-smi finds no GPU here. This needs a machine with an NVIDIA GPU and its driver."
    return None


def build_kernels(site: Path) -> None:
    """Compile csrc/ in the checkout for this machine's GPUs only; prints the parts that cannot be built."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", tempfile.mkdtemp()]
    done = subprocess.run(command, cwd=ROOT, env=environment(site), capture_output=True, text=True)
    output = (done.stdout + done.stderr).splitlines()
    print(*([line for line in output if line.startswith("gram_engine: ")] or output[-20:]), sep="\n", flush=True)


def environment(site: Path) -> dict[str, str]:
    """Environment of child processes: they import from `site` and the checkout, and compile for this machine's GPUs."""
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    found.setdefault("GRAM_CUDA_ARCHS", ";".join(map(architecture, compute_capabilities())))
    return found


def architecture(capability: str) -> str:
    """nvcc's name for a compute capability: 8.0 is 80, 9.0 is 90a (`a`: with instructions that only this one has)."""
    name = capability.replace(".", "")
    return f"{name}a" if int(name) >= 90 else name


def differences() -> dict[str, str]:
    """Package -> "VERSION, pinned VERSION", for packages of this Python whose version is not the pinned one."""
    found = {name: (installed(name), version) for name, version in pins("requirements.txt").items()}
    return {name: f"{has}, pinned {pin}" for name, (has, pin) in found.items() if has and has.split("+")[0] != pin}


def _fetch_again(further: list[str] = ()) -> str:
    python = f"--python 3.{sys.version_info.minor}"
    return " ".join([FETCH, *further, python])


if __name__ == "__main__":
    main()
