"""How the kernels are registered, chosen, compiled and built, on whatever machine this is."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gram_engine.errors import ConfigError
from gram_engine.kernels import dispatch
from gram_engine.kernels.pair_loss import pair_loss
from tests.support.cases import short_first
from tests.support.kernels import CUDA, DEVICE, IMPLEMENTATIONS, draw, use

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "gram_engine" / "kernels"
HAS_NVCC = shutil.which("nvcc") is not None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operators_pass_opcheck(implementation, monkeypatch):
    use(implementation, monkeypatch)
    hidden = draw(5, 64).float().requires_grad_()
    direction = draw(64, seed=1).float().requires_grad_()
    rows = torch.tensor([0, 4, -1], device=DEVICE)
    vector = torch.rand(3, device=DEVICE)
    torch.library.opcheck(torch.ops.gram_engine.pair_loss, (hidden, rows, direction, vector.round(), 0.1, 1e-5))
    torch.library.opcheck(torch.ops.gram_engine.pair_loss, (hidden, None, direction, torch.ones(5, device=DEVICE), 0.1, None))
    torch.library.opcheck(
        torch.ops.gram_engine.pair_loss_backward,
        (hidden.detach(), rows, direction.detach(), vector, vector, vector, 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )
    if implementation == "cuda":
        return
    logits, targets = draw(3, 50).float(), torch.tensor([4, -1, 7], device=DEVICE)
    torch.library.opcheck(torch.ops.gram_engine.cross_entropy_stats, (logits, targets, 45))
    torch.library.opcheck(torch.ops.gram_engine.cross_entropy_grad_, (logits, targets, vector, 45, 0.9, 0.002))


def test_the_first_that_works_is_chosen(monkeypatch):
    monkeypatch.delenv("GRAM_KERNELS", raising=False)
    for operation in ("pair_loss_forward", "pair_loss_backward", "cross_entropy_stats", "cross_entropy_grad_"):
        name = dispatch.name_of(operation, DEVICE)
        possible = [n for n in dispatch.ORDER[DEVICE.type] if hasattr(dispatch._load(n)[0], operation)]
        assert name == possible[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_cpu_kernels_are_built_where_there_is_a_compiler():
    assert (KERNELS / "libgram_cpu.so").is_file()


def test_a_kernel_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv("GRAM_KERNELS", "fast")
    with pytest.raises(ConfigError, match="GRAM_KERNELS=fast: unknown. Use auto, cuda, triton, cpu, reference."):
        pair_loss(draw(2, 4), draw(4), torch.ones(2), 0.1)
    if not CUDA:
        monkeypatch.setenv("GRAM_KERNELS", "cuda")
        with pytest.raises(ConfigError, match="GRAM_KERNELS=cuda cannot be used here: torch finds no GPU. Unset it"):
            pair_loss(draw(2, 4), draw(4), torch.ones(2), 0.1)


@pytest.mark.skipif(CUDA or not HAS_NVCC, reason="needs nvcc and no GPU")
def test_cuda_library_without_a_gpu_returns_an_error_code():
    library = ctypes.CDLL(str(KERNELS / "libgram_cuda.so"))
    library.gram_cuda_error.restype = ctypes.c_char_p
    call, null = ctypes.c_int64, ctypes.c_void_p()
    code = library.gram_pair_loss_forward(
        0, null, call(1), null, null, null, ctypes.c_double(0.1), ctypes.c_double(1e-5), call(1), call(1), *[null] * 5
    )
    assert code != 0 and len(library.gram_cuda_error(code)) > 5


@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc")
@pytest.mark.parametrize("architecture", short_first(["90a"], ["80", "90a", "100a"]))
def test_cuda_kernels_compile_without_spilling(architecture, tmp_path):
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-c", "-O3", "-std=c++20", "-Xptxas", "-v", target, "csrc/pair_loss.cu", "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == 8  # two kernels, four dtypes
    assert set(spills) == {("0", "0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert max(registers) <= 64


AHEAD_OF_TIME = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
torch.cuda.is_available = lambda: True  # to import the kernels; nothing is launched
from gram_engine.kernels import triton_kernels as kernels

KERNELS = {name: getattr(kernels, name) for name in dir(kernels) if name.endswith("_kernel")}
REALS = dict(label_smoothing=0.05, norm_eps=1e-5, target_weight=0.8, other_weight=0.1 / 128256)
BLOCKS = {"stats_kernel": kernels.VOCABULARY, "gradient_kernel": kernels.VOCABULARY}
TYPES = dict.fromkeys(("hidden", "logits", "grad_rows"), "model's") | dict.fromkeys(("rows", "targets"), "*i64")
TYPES |= dict.fromkeys(("stride", "size", "labels", "columns", "valid"), "i64")
TYPES |= dict.fromkeys(REALS, "fp32")  # which a Python float becomes where it is not constexpr


def compile_kernel(name, capability, model_dtype, dtype):
    values = REALS | dict(has_rows=True, has_norm=True, dtype=dtype, block=BLOCKS.get(name, kernels.COLUMNS))
    constants = {p.name: values[p.name] for p in KERNELS[name].params if p.is_constexpr}
    types = {key: TYPES.get(key, "*" + str(dtype)).replace("model's", "*" + model_dtype) for key in KERNELS[name].arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    return triton.compile(ASTSource(KERNELS[name], types, constants), target=GPUTarget("cuda", capability, 32),
                          options={"enable_fp_fusion": True})
"""
EVERY_KERNEL = """
for name in KERNELS:
    for capability in (80, 90, 100):
        assert len(compile_kernel(name, capability, "bf16", kernels.tl.float32).asm["cubin"]) > 1000
        print(name, capability)
"""
FLOAT64_KERNELS = """
for name in KERNELS:
    print(compile_kernel(name, 90, "fp64", kernels.tl.float64).asm["ttir"])
"""


def ahead_of_time(program: str) -> str:
    """What the program prints after AHEAD_OF_TIME: a process of its own, where Triton compiles whatever the machine."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME + program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_kernels_compile_ahead_of_time():
    assert len(ahead_of_time(EVERY_KERNEL).splitlines()) == 5 * 3


def test_real_numbers_reach_float64_triton_kernels_unrounded():
    """As parameters they would be fp32; Triton's interpreter does not round them, so only compiled kernels tell."""
    code = ahead_of_time(FLOAT64_KERNELS)
    signatures = re.findall("tt.func public.*", code)
    assert len(signatures) == 5 and all("f64" in signature and "f32" not in signature for signature in signatures)
    constants = re.findall(r"arith.constant (?:dense<)?([-+.\de]+)>? : (?:tensor<\d+x)?(f\d+)", code, re.IGNORECASE)
    exact = {float(number) for number, dtype in constants if dtype == "f64"}
    assert exact >= {0.05, 1 - 2 * 0.05, 1e-5, 0.8, 0.1 / 128256}
    assert {float(number) for number, dtype in constants if dtype != "f64"} <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    "hidden_tool, message",
    [
        ("nvcc", "CUDA kernels not built: no nvcc found. .* GPUs use the Triton kernels instead."),
        ("g++", "CPU kernels not built: no C.. compiler found. .* CPU training uses the PyTorch reference"),
    ],
)
def test_setup_says_what_it_could_not_build(hidden_tool, message, tmp_path):
    """A PATH with nothing but what setuptools needs: neither a compiler nor nvcc."""
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(message, done.stdout), done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_a_failing_compiler_does_not_stop_the_installation(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0
    assert "broken compiler" in done.stdout and "CPU kernels not built: g++ failed" in done.stdout
