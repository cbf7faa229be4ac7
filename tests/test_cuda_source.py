"""csrc/pair_loss.cu, compiled for the CPU (tests/simt), against the float64 reference; planted faults must be detected."""

import contextlib
import importlib.util
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gram_engine.kernels import reference
from tests.support.kernels import NORM_EPS, draw

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "csrc" / "pair_loss.cu").read_text()
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
HALF_UNIT = {torch.bfloat16: 2**-9, torch.float16: 2**-11}  # relative error of rounding the gradient of the rows
NAMES = ("loss", "margin", "rstd", "dloss_dmargin", "grad_rows", "grad_direction")
GUARD = 4096  # elements before and after each tensor; more than a block or row that is off by one can reach

# name: text of the source, its replacement, and the start of the resulting error
FAULTS = {
    "no barrier": ("  __syncthreads();\n", "", "^loss"),
    "wrong shuffle distance": ("int step = 16;", "int step = 8;", "^loss"),
    "shuffle by half a warp": ("    first += __shfl", "    if (threadIdx.x % 2) first += __shfl", "threads of a block wait"),
    "last warp left out": ("warp < kWarps; ++warp", "warp < kWarps - 1; ++warp", "^loss"),
    "stride left out": ("hidden + row * stride", "hidden + row * size", "^loss"),
    "padding read": ("if (row >= 0) sum +=", "sum +=", "^grad_direction"),
    "written beyond the end": ("  if (column >= size) return;\n", "", "written out of bounds"),
    "last column left out": ("if (column >= size) return;", "if (column >= size - 1) return;", "^grad_direction"),
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile csrc/pair_loss.cu with")


def on_cpu(source: str, folder: Path):
    """The module gram_engine/kernels/cuda.py with a library compiled from `source` for the CPU."""
    text, launches = re.subn(r"(\w+<T, A>)<<<(.+?)>>>\(", r"simt::launch(\2, \1, ", source)
    assert launches == 2, "csrc/pair_loss.cu launches its kernels in another way than this test knows"
    (folder / "pair_loss.cpp").write_text(text)
    command = ["g++", "-std=c++20", "-fPIC", "-shared", f"-I{ROOT / 'tests' / 'simt'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, folder / "pair_loss.cpp", "-o", folder / "libgram_cuda.so"], check=True)
    shutil.copy(ROOT / "gram_engine" / "kernels" / "cuda.py", folder)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", folder / "cuda.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return on_cpu(SOURCE, tmp_path_factory.mktemp("simt"))


@pytest.fixture(autouse=True)
def launches_need_no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))


def guarded(tensor, guard):
    """(a copy of the tensor, the memory around it, which holds `guard` on both sides)."""
    memory = torch.full((tensor.numel() + 2 * GUARD,), guard, dtype=tensor.dtype)
    return memory[GUARD:-GUARD].view(tensor.shape).copy_(tensor), memory


def outputs(*shapes_and_dtypes):
    """Output tensors that hold NaN, between ones, and a function that checks that the ones are still there."""
    made = [guarded(torch.full(shape, math.nan, dtype=dtype), guard=1) for shape, dtype in shapes_and_dtypes]

    def check() -> None:
        for _, memory in made:
            assert (memory[:GUARD] == 1).all() and (memory[-GUARD:] == 1).all(), "written out of bounds"

    return [tensor for tensor, _ in made], check


def run(kernels, hidden, rows, direction, preference, upstream, norm_eps):
    """[loss, margin, rstd, dloss_dmargin, gradient of the rows, gradient of direction] by cuda.py or reference.py, float64."""
    vector = (len(preference),), direction.dtype
    found, check = outputs(vector, vector, vector, vector)
    kernels.pair_loss_forward(hidden, rows, direction, preference, 0.1, -1.0 if norm_eps is None else norm_eps, *found)
    check()
    grads, check = outputs(((len(preference), hidden.shape[1]), hidden.dtype), (direction.shape, direction.dtype))
    kernels.pair_loss_backward(hidden, rows, direction, found[1], found[2], upstream, norm_eps is not None, *grads)
    check()
    return [tensor.double() for tensor in (*found, *grads)]


def by_reference(hidden, rows, *vectors, norm_eps):
    """What `run` gives for the reference, computed in float64."""
    return run(reference, hidden.double(), rows, *(vector.double() for vector in vectors), norm_eps)


def compare(cuda, dtype, tokens, size, with_rows, norm_eps):
    """Raises AssertionError or RuntimeError if the kernels differ from the reference.

    There are gaps between the rows, and NaN in these gaps, in rows without a label, and around every tensor.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rows = torch.tensor([tokens - 1, 0, -1, 0, tokens // 2]) if with_rows else None
    used = torch.arange(tokens) if rows is None else rows[rows >= 0]
    labels = tokens if rows is None else len(rows)
    hidden = draw(tokens, size).cpu().to(dtype)
    direction = draw(size, seed=1, scale=size**-0.5).cpu().to(wide)
    preference = torch.tensor([1.0, 0.0, 0.5, 0.8], dtype=wide).repeat(labels)[:labels]
    upstream = draw(labels, seed=2).cpu().to(wide)
    wanted = by_reference(hidden, rows, direction, preference, upstream, norm_eps=norm_eps)

    with_gaps = torch.full((tokens, size + 3), math.nan, dtype=dtype)
    with_gaps[used, :size] = hidden[used]
    floats = [guarded(tensor, guard=math.nan)[0] for tensor in (with_gaps, direction, preference, upstream)]
    rows = None if rows is None else guarded(rows, guard=-1)[0]
    found = run(cuda, floats[0][:, :size], rows, *floats[1:], norm_eps)
    for name, ours, theirs in zip(NAMES, found, wanted):
        rounding = HALF_UNIT.get(dtype, 0) if name == "grad_rows" else 0
        error, size_of_theirs = (ours - theirs).norm(), theirs.norm()
        assert error <= TOLERANCES[dtype] * (1 + size_of_theirs) + rounding * size_of_theirs, name


@pytest.mark.parametrize("norm_eps", [None, NORM_EPS])
@pytest.mark.parametrize("with_rows", [False, True], ids=["all", "rows"])
@pytest.mark.parametrize("tokens, size", [(1, 1), (7, 257), (3, 1100)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_kernels_equal_the_reference(cuda, dtype, tokens, size, with_rows, norm_eps):
    compare(cuda, dtype, tokens, size, with_rows, norm_eps)


@pytest.mark.parametrize("norm_eps", [None, NORM_EPS])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_extreme_values(cuda, dtype, norm_eps):
    hidden = torch.tensor([[1e4, 1], [-1e4, 1], [1, 2], [math.nan, 1], [math.inf, 1], [-math.inf, 1], [0, 0]], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    vectors = [torch.tensor([1.0, -0.5]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5]), torch.ones(7)]
    arguments = (hidden, None, *(vector.to(wide) for vector in vectors))
    found, wanted = run(cuda, *arguments, norm_eps), by_reference(*arguments, norm_eps=norm_eps)
    *others, grad_rows, grad_direction = range(6)
    for number in (*others, grad_direction, grad_rows):
        rtol = HALF_UNIT.get(dtype, 2e-6) if number == grad_rows else 2e-6
        assert torch.allclose(found[number], wanted[number], rtol=rtol, atol=1e-6, equal_nan=True), number
    assert found[0][:3].isfinite().all() and not found[0][3].isfinite()


def test_results_do_not_depend_on_the_order_of_threads(cuda):
    """Each launch runs the threads in another order."""
    arguments = (draw(5, 300).cpu().float(), None, draw(300, seed=1).cpu().float(), torch.ones(5), torch.ones(5), NORM_EPS)
    first, *others = (run(cuda, *arguments) for _ in range(3))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other))


def test_a_position_beyond_two_to_the_31_elements(cuda):
    """Only the last row is accessed; memory that is never accessed is not allocated."""
    hidden = torch.empty(2**31 // 4096 + 2, 4096, dtype=torch.bfloat16)
    hidden[-1] = draw(4096).cpu().bfloat16()
    arguments = (draw(4096, seed=1).cpu().float(), torch.ones(1), torch.ones(1), NORM_EPS)
    found = run(cuda, hidden, torch.tensor([len(hidden) - 1]), *arguments)
    again = run(cuda, hidden[-1:].clone(), None, *arguments)
    assert all(torch.equal(*pair) for pair in zip(found, again))


def planted(old: str, new: str) -> str:
    """The source with a fault in it."""
    assert SOURCE.count(old) == 1, f"csrc/pair_loss.cu has {old!r} {SOURCE.count(old)} times: this fault cannot be planted"
    return SOURCE.replace(old, new)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_detected(fault, tmp_path):
    old, new, shows = FAULTS[fault]
    broken = on_cpu(planted(old, new), tmp_path)
    with pytest.raises((AssertionError, RuntimeError), match=shows):
        compare(broken, torch.float32, 7, 257, True, NORM_EPS)


def test_a_fault_that_cannot_be_planted_is_reported():
    with pytest.raises(AssertionError, match="0 times: this fault cannot be planted"):
        planted("no such line", "")
