"""Installation: pins of both stacks, which Python makes the environment, what a GPU machine lacks before anything compiles."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gram_engine.benchmarks import offline
from gram_engine.install import gpu as gpu_install
from gram_engine.install.gpu import Machine
from gram_engine.install.pins import PYTHONS, ROOT, pins

HERE = sys.version_info[:2]
FILES = ("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt")


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(command: list, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = list(map(str, command))
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("file", FILES)
def test_pins_are_what_pip_reads(file, python):
    where = {"python_version": f"{python[0]}.{python[1]}", "platform_system": "Linux"}
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    read = [found for found in map(Requirement, lines) if found.marker is None or found.marker.evaluate(where)]
    assert pins(file, python) == {found.name: str(found.specifier).removeprefix("==") for found in read}


def test_each_python_has_one_stack():
    core = {python: pins(FILES[0], python)["megatron-core"] for python in PYTHONS}
    engine = {python: pins(FILES[2], python)["transformer-engine"] for python in PYTHONS}
    assert {python: (core[python], engine[python]) for python in PYTHONS} == {
        (3, 11): ("0.16.1", "2.11.0"),
        (3, 12): ("0.19.2", "2.20.2"),
        (3, 13): ("0.19.2", "2.20.2"),
    }
    assert {pins(FILES[0], python)["torch"] for python in PYTHONS} == {"2.13.0"}


def test_every_place_names_the_same_pythons():
    names = [f"{major}.{minor}" for major, minor in PYTHONS]
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    tested = re.findall(r'"([\d.]+)"', re.search(r"python: (\[.*?\])", workflow)[1])
    assert tested == names[:2], "a Python of each stack"
    assert f'supported="{names[0]}, {names[1]} or {names[2]}"' in (ROOT / "tools/make_venv.sh").read_text()
    first, behind = re.search(r'python_requires=">=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text()).groups()
    assert (first, behind) == (names[0], f"3.{PYTHONS[-1][1] + 1}")


def test_wheels_for_the_offline_check_travel_and_are_not_committed():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a Git checkout")
    git = ["git", "-c", f"safe.directory={ROOT}"]
    assert run([*git, "ls-files", "--", ".whl"], dict(os.environ)).stdout == ""
    assert run([*git, "check-ignore", "-q", ".whl/any.whl"], dict(os.environ)).returncode == 1


# tools/make_venv.sh


def fake_python(path: Path, version: str, has_venv: bool = True) -> Path:
    """A Python that tells its version; making an environment with it succeeds and makes nothing but a mark."""
    answer = f'case "$2" in *python_version*) echo {version};; *ensurepip*) exit {0 if has_venv else 1};; esac'
    return script(path, f'[ "$1" = --version ] && echo "Python {version}"\n[ "$1" = -c ] && {{ {answer}; exit; }}\nexit 7')


def make_venv(tmp_path: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """make_venv.sh with nothing but fake Pythons to be found."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "cut", "cat", "sha256sum", "env", "sh"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name))
    found = {"PATH": f"{tmp_path / 'bin'}:{tools}", "HOME": str(tmp_path), **variables}
    return run([tools / "bash", "tools/make_venv.sh", folder], found)


def test_a_supported_python3_is_preferred(tmp_path):
    fake_python(tmp_path / "bin/python3", "3.13.2")
    fake_python(tmp_path / "bin/python3.11", "3.11.7")
    assert "with Python 3.13.2" in make_venv(tmp_path, tmp_path / "new").stdout


def test_a_python_of_pyenv_is_found(tmp_path):
    fake_python(tmp_path / "bin/python3", "3.10.1")
    fake_python(tmp_path / ".pyenv/versions/3.9.1/bin/python", "3.9.1")
    fake_python(tmp_path / ".pyenv/versions/3.12.4/bin/python", "3.12.4")
    assert "with Python 3.12.4" in make_venv(tmp_path, tmp_path / "new").stdout
    fake_python(tmp_path / "other/versions/3.13.0/bin/python", "3.13.0")
    assert "with Python 3.13.0" in make_venv(tmp_path, tmp_path / "new", PYENV_ROOT=str(tmp_path / "other")).stdout


@pytest.mark.parametrize("version, has_venv, told", [
    ("3.10.13", True, "3.10.13"), ("3.14.0", True, "3.14.0"), ("2.7.18", True, "2.7.18"), ("3.1.5", True, "3.1.5"),
    ("3.12.3", False, "3.12.3 without the venv module"),
])  # fmt: skip
def test_an_unsuitable_python_is_one_line_before_anything_is_made(version, has_venv, told, tmp_path):
    fake_python(tmp_path / "bin/python3", version, has_venv)
    done = make_venv(tmp_path, tmp_path / "new")
    assert done.returncode == 1 and not (tmp_path / "new").exists()
    assert re.fullmatch(rf"error: Python 3.11, 3.12 or 3.13 .*\(python3 is {told}\).* apt-get install .*\n", done.stderr)


def test_no_python_or_not_the_one_asked_for(tmp_path):
    assert "(none found)" in make_venv(tmp_path, tmp_path / "new").stderr
    fake_python(tmp_path / "bin/python3", "3.12.3")
    asked = make_venv(tmp_path, tmp_path / "new", PYTHON="python3.15")
    assert asked.returncode == 1 and "(none found as python3.15)" in asked.stderr


def test_an_environment_of_another_python_is_refused(tmp_path):
    fake_python(tmp_path / "old/bin/python", "3.10.4")
    done = make_venv(tmp_path, tmp_path / "old")
    assert done.returncode == 1 and f"error: {tmp_path}/old has Python 3.10.4, and 3.11, 3.12 or 3.13 is needed" in done.stderr
    assert f"rm -r {tmp_path}/old" in done.stderr and done.stderr.count("\n") == 1
    fake_python(tmp_path / "old/bin/python", "3.11.7")
    asked = fake_python(tmp_path / "asked", "3.12.1")
    done = make_venv(tmp_path, tmp_path / "old", PYTHON=str(asked))
    assert done.returncode == 1 and f"has Python 3.11.7, and PYTHON={asked} is 3.12.1: rm -r" in done.stderr
    fake_python(asked, "3.11.9")
    assert "has Python" not in make_venv(tmp_path, tmp_path / "old", PYTHON=str(asked)).stderr


# gram_engine/install/gpu.py


@pytest.fixture
def gpu_machine(tmp_path):
    """Environment of a machine with everything: a GPU, a toolkit, torch 2.13.0 for CUDA, its wheels' headers."""
    script(tmp_path / "bin/nvidia-smi", "echo 9.0; echo 9.0")
    toolkit(tmp_path, "13.1")
    site = tmp_path / "site"
    torch_of(site, "2.13.0+cu130", "13.0")
    for header in gpu_install.HEADERS:
        place = site / "nvidia" / {"cudnn.h": "cudnn", "nccl.h": "nccl"}.get(header, "cu13") / "include" / header
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    script(tmp_path / "bin/g++", "[ $1 = -dumpfullversion ] && echo 12.2.0; exit 0")
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "cuda")}
    return environment | {"PYTHONPATH": f"{site}:{ROOT}", "MAX_JOBS": "3"}


def toolkit(folder: Path, version: str) -> None:
    script(folder / "cuda/bin/nvcc", f"echo Cuda compilation tools, release {version}, V{version}.1")
    (folder / "cuda/include").mkdir(exist_ok=True)
    (folder / "cuda/include/cuda_runtime.h").touch()


def torch_of(site: Path, version: str, cuda: str | None) -> None:
    (site / "torch").mkdir(parents=True, exist_ok=True)
    (site / "torch/__init__.py").write_text("raise RuntimeError('read, not imported')")
    (site / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")


def distribution(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def check(environment: dict[str, str]) -> subprocess.CompletedProcess:
    return run([sys.executable, "-m", "gram_engine.install.gpu", "--check"], environment)


def test_a_good_machine_is_told_the_time_and_what_the_builds_read(gpu_machine, tmp_path):
    done = check(gpu_machine)
    assert done.returncode == 0, done.stderr
    version = pins(FILES[2])["transformer-engine"]
    wanted = f"transformer-engine {version} and flash-attn 2.8.3, compiled against torch 2.13.0+cu130"
    assert wanted in done.stdout and re.search(r"about \d+ minutes with 3 compilers", done.stdout)
    told = dict(line.strip().split("=", 1) for line in done.stdout.splitlines()[1:])
    site = tmp_path / "site/nvidia"
    assert told["CPATH"].split(":") == [f"{site}/{name}/include" for name in ("cu13", "cudnn", "nccl")]
    assert told["CUDA_HOME"] == str(tmp_path / "cuda") and told["FLASH_ATTN_CUDA_ARCHS"] == told["NVTE_CUDA_ARCHS"] == "90"


def no_gpu(tmp_path):
    script(tmp_path / "bin/nvidia-smi", "echo No devices were found; exit 6")


def old_gpu(tmp_path):
    script(tmp_path / "bin/nvidia-smi", "echo 7.5")


def cpu_torch(tmp_path):
    torch_of(tmp_path / "site", "2.13.0+cpu", None)


def new_torch(tmp_path):
    torch_of(tmp_path / "site", "2.14.1+cu130", "13.0")


def older_cuda(tmp_path):
    torch_of(tmp_path / "site", "2.13.0+cu126", "12.6")
    toolkit(tmp_path, "12.8")


def old_nvcc(tmp_path):
    torch_of(tmp_path / "site", "2.13.0+cu131", "13.1")
    toolkit(tmp_path, "13.0")


def other_nvcc(tmp_path):
    toolkit(tmp_path, "12.9")


def no_cudnn(tmp_path):
    (tmp_path / "site/nvidia/cudnn/include/cudnn.h").unlink()


def no_cublas(tmp_path):
    (tmp_path / "site/nvidia/cu13/include/cublas_v2.h").unlink()


def old_compiler(tmp_path):
    script(tmp_path / "bin/g++", "[ $1 = -dumpfullversion ] && echo 9.4.0 && exit 0; cat >/dev/null; exit 1")


def other_engine(tmp_path):
    distribution(tmp_path / "site", "transformer-engine-torch", "2.3.0")


def broken_flash(tmp_path):
    distribution(tmp_path / "site", "flash-attn", "2.8.3")
    (tmp_path / "site/flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")


@pytest.mark.parametrize("break_it, line", [
    (no_gpu, "nvidia-smi finds no GPU here"),
    (old_gpu, r"a GPU of compute capability 7.5: flash-attn 2.8.3 knows 8.x, .* --transformer-impl local"),
    (cpu_torch, r"torch 2.13.0\+cpu is a build without CUDA; .* pip uninstall -y torch && .* --index-url https://pypi.org/simple"),
    (new_torch, r"torch 2.14.1\+cu130 is installed, .* torch 2.13.0; flash-attn is compiled as C\+\+17, .* pip install "),
    (older_cuda, r"torch 2.13.0\+cu126 is built for CUDA 12.6, transformer-engine for 13: .* pip install "),
    (old_nvcc, r"nvcc 13.0 in .*/cuda is older than torch's CUDA 13.1: .*-13-1 .*CUDA_HOME=/usr/local/cuda-13.1 make gpu"),
    (other_nvcc, r"nvcc 12.9 in .*/cuda is of another major version than torch's CUDA 13.0: apt-get install cuda-toolkit-13-0"),
    (no_cudnn, r"cudnn.h is neither in .* pip install --force-reinstall --no-deps 'nvidia-cudnn-cu13.*'"),
    (no_cublas, r"cublas_v2.h is neither in .* pip install --force-reinstall 'cuda-toolkit\[cublas\].*'"),
    (old_compiler, r".*g\+\+ 9.4.0 does not compile C\+\+20: apt-get install g\+\+-12, then CC=gcc-12 CXX=g\+\+-12 make gpu"),
    (other_engine, r"transformer-engine-torch 2.3.0 is .*; megatron-core [\d.]+ \(Python 3.\d+\) wants 2.\d+.\d: .* uninstall"),
    (broken_flash, r"flash-attn 2.8.3 is installed but cannot be imported \(.*undefined symbol.*\): .* uninstall -y flash"),
])  # fmt: skip
def test_what_is_missing_is_one_line_before_anything_is_built(break_it, line, gpu_machine, tmp_path):
    break_it(tmp_path)
    done = check(gpu_machine)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(f"error: {line}.*\n", done.stderr), done.stderr


def test_all_that_is_missing_is_told_at_once(gpu_machine, tmp_path):
    for break_it in (no_gpu, old_compiler, no_cudnn, other_engine):
        break_it(tmp_path)
    assert check(gpu_machine).stderr.count("error: ") == 4


def test_without_a_compiler_nvcc_or_torch():
    bare = Machine(("9.0",), None, None, None, None, None, None)
    assert [line.split(":")[0] for line in gpu_install.check_torch(bare)] == ["torch is not installed"]
    assert "cuda-toolkit-13-0" in next(gpu_install.check_nvcc(bare)) and "no nvcc" in next(gpu_install.check_nvcc(bare))
    assert "apt-get install g++" in next(gpu_install.check_compiler(bare))


@pytest.mark.parametrize("nvcc, fits", [("13.0", True), ("13.2", True), ("13.10", True), ("12.9", False), ("14.0", False)])
def test_nvcc_may_be_newer_within_the_major_version(nvcc, fits):
    machine = Machine(("9.0",), "2.13.0", "13.0", None, Path("/cuda"), nvcc, "g++")
    assert (list(gpu_install.check_nvcc(machine)) == []) == fits


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_this_machines_compiler_knows_cpp20():
    """The test program is correct, so that a refusal is the compiler's."""
    assert list(gpu_install.check_compiler(Machine((), None, None, None, None, None, "g++"))) == []


def test_memory_and_cores_limit_the_jobs(tmp_path):
    assert [gpu_install.jobs(cores, gib) for cores, gib in ((16, 1000), (16, 40), (2, 1000), (16, 2))] == [16, 4, 2, 1]
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   8388608 kB\n")
    assert gpu_install.available_gib(tmp_path) == 8
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    for text, gib in (("max\n", 8), (f"{3 << 30}\n", 3), (f"{300 << 30}\n", 8)):
        limit.write_text(text)
        assert gpu_install.available_gib(tmp_path) == gib


# tools/gpu_check.sh


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="needs a machine without a GPU")
def test_gpu_check_refuses_without_a_gpu(tmp_path):
    done = run(["bash", "tools/gpu_check.sh"], {**os.environ, "VENV": str(tmp_path / "never")})
    assert done.returncode == 2 and "no nvidia-smi here" in done.stderr and not (tmp_path / "never").exists()
    own = {"PYTHON": sys.executable, "TMPDIR": str(tmp_path), "WHEELS": str(tmp_path)}
    done = run(["bash", "tools/gpu_check.sh", "--offline"], {**os.environ, **own})
    assert done.returncode == 2 and "nvidia-smi finds no GPU here" in done.stderr, done.stderr


def test_offline_names_every_missing_package(tmp_path):
    """A Python without packages, as far as they can be kept from it: -S leaves site-packages out."""
    run_module = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_module(sys.argv.pop(2), run_name='__main__')"
    bare = script(tmp_path / "python", f'shift; exec {Path(sys.executable).resolve()} -S -I -c "{run_module}" "$0" "$@"')
    own = {"PYTHON": str(bare), "TMPDIR": str(tmp_path), "WHEELS": str(tmp_path)}
    done = run(["bash", "tools/gpu_check.sh", "--offline"], {**os.environ, **own})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for name in (*pins(FILES[0]), "pytest", "pytest-timeout", "triton", "docstring-parser"):
        assert re.search(rf"[ ,]{name}[,.]", done.stderr), name
    again = done.stderr.split("Where pip works: ")[1]
    assert again.startswith("tools/gpu_check.sh --offline --fetch-wheels torch transformers")
    assert f"--python 3.{HERE[1]}" in again and "megatron-core" not in again  # what is always fetched need not be named


@pytest.mark.parametrize("python, core", [("3.12", "0.19.2"), ("3.11", "0.16.1")])
def test_wheels_are_fetched_for_the_other_machines_python(python, core, tmp_path, monkeypatch):
    told = tmp_path / "told"
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", f'echo "$@" >{told}')))
    offline.main(["--fetch-wheels", "einops", "--python", python])
    words = told.read_text().split()
    assert words[words.index("--python-version") + 1] == python and words[words.index("-d") + 1] == str(offline.WHEELS)
    assert words[-5:-3] == [f"megatron-core=={core}", f"tyro=={pins(FILES[0])['tyro']}"] and words[-1] == "einops"


def test_fetching_refuses_what_it_does_not_know(capsys):
    for arguments, told in (
        (["--python", "3.10"], "error: --python 3.10: there are pins for 3.11, 3.12, 3.13."),
        (["--minutes", "9"], "--fetch-wheels takes names of packages and --python: --minutes 9"),
    ):
        with pytest.raises(SystemExit) as stopped:
            offline.main(["--fetch-wheels", *arguments])
        assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_kernels_are_built_for_this_gpu_alone(tmp_path, monkeypatch):
    assert [offline.architecture(name) for name in ("8.0", "8.9", "9.0", "10.0", "12.0")] == ["80", "89", "90a", "100a", "120a"]
    script(tmp_path / "nvidia-smi", "echo 9.0; echo 9.0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("GRAM_CUDA_ARCHS", raising=False)
    assert offline.environment(tmp_path)["GRAM_CUDA_ARCHS"] == "90a"
    monkeypatch.setenv("GRAM_CUDA_ARCHS", "80")
    assert offline.environment(tmp_path)["GRAM_CUDA_ARCHS"] == "80"
