"""The benchmarks measure the same arithmetic for every contestant, and write what they measured."""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from gram_engine.benchmarks import gpu_check, losses, offline, peers, planned_memory, results
from gram_engine.benchmarks.command import BENCHMARKS
from gram_engine.benchmarks.command import main as benchmark_main
from gram_engine.benchmarks.measure import PeakMemory, in_new_processes, measure
from gram_engine.benchmarks.results import MEMORY_FLOOR, Row, add_ratios, table
from gram_engine.errors import GramError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GRAM_BENCHMARK = [sys.executable, "-m", "gram_engine.cli", "benchmark"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_explains_its_flags(name, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark_main([name, "--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out


def test_names_and_flags_that_do_not_exist_are_refused(capsys):
    for arguments, status in ([["--help"], 0], [[], 2], [["speed"], 2], [["losses", "--no-such-flag"], 2]):
        with pytest.raises(SystemExit) as ended:
            benchmark_main(arguments)
        assert ended.value.code == status
    text = capsys.readouterr().out
    assert all(f"gram benchmark {name} " in text for name in BENCHMARKS)


def problem():
    return losses.make_problem(96, 32, 40, 4, torch.float32, CPU)


def hidden_gradient(made, run):
    made.clear_gradients()
    run()
    return made.hidden.grad


def test_stage_1_contestants_give_the_same_gradient():
    made = problem()
    contestants = losses.stage_1(made, chunk_size=16)
    contestants.pop("megatron-core vocab-parallel cross entropy")  # needs process groups: the command below runs it
    wanted = hidden_gradient(made, contestants.pop(losses.ALL_LOGITS))
    assert len(contestants) >= 2
    for name, run in contestants.items():
        torch.testing.assert_close(hidden_gradient(made, run), wanted, msg=name)


def test_stage_2_two_token_contestants_give_the_same_gradient():
    made = problem()
    contestants = losses.stage_2(made)
    wanted = hidden_gradient(made, contestants["label rows, weight[[a, b]] by autograd"])
    found = hidden_gradient(made, contestants["gram_engine pair_loss, all rows given"])
    torch.testing.assert_close(found, wanted)


def test_command_prints_a_table_and_writes_json(tmp_path):
    output = tmp_path / "rows.json"
    command = [*GRAM_BENCHMARK, "losses", "--shapes", "tiny", "--repeats", "1", "--steps", "--step-models", "tiny",
               "--step-tokens", "256", "--json", str(output)]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    assert "megatron-core vocab-parallel cross entropy" in done.stdout and "tokens/s" in done.stdout
    content = json.loads(output.read_text())
    assert content["versions"]["torch"] == torch.__version__
    assert content["command"].startswith("gram benchmark losses --shapes tiny")
    by_name = {(row["benchmark"], row["name"]): row for row in content["rows"]}
    assert len(by_name) == 4 + 6 + 3
    for row in content["rows"]:
        assert row["median_ms"] > 0 and row["baseline"] and row["dtype"] == "float32" and row["shape"]["vocabulary"] == 512
        assert row["time_ratio"] == pytest.approx(by_name[row["benchmark"], row["baseline"]]["median_ms"] / row["median_ms"])


def test_peak_memory_sees_what_lives_for_a_moment():
    with PeakMemory(CPU) as peak:
        torch.ones(16 << 20).sum()  # 64 MiB of float32
    if peak.bytes is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 60 << 20 < peak.bytes < 120 << 20


def test_what_a_call_leaves_behind_counts_in_its_peak():
    """As a gradient does; the call before it must not leave the same, freed on the way."""
    kept = []

    def leave() -> None:
        kept[:] = [torch.ones(16 << 20)]

    _, _, peak = measure(leave, CPU, repeats=1, budget_seconds=1.0, prepare=kept.clear)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 60 << 20 < peak < 120 << 20


def test_memory_below_the_floor_counts_as_the_floor():
    base = dict(benchmark="b", shape={"tokens": 4}, dtype="float32", device="d", repeats=1, baseline="slow")
    rows = [
        Row(name="slow", median_ms=10.0, peak_bytes=64 * MEMORY_FLOOR, **base),
        Row(name="fast", median_ms=1.0, peak_bytes=10, **base),
    ]
    add_ratios(rows)
    assert (rows[1].time_ratio, rows[1].memory_ratio) == (10.0, 64.0)
    assert "10.00x" in table(rows) and "< 1 MiB" in table(rows)


PEERS = peers.Peers(
    shape="--num-layers 2 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2", vocab_size=512,
    dtype="float32", seq_length=512, global_batch_size=8, pack=2, steps=1, warmup=1, trl=False,
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("stage, contestants", [("1", 4), ("2", 5)])
def test_peers_do_the_same_work(stage, contestants, capsys):
    """The first step's loss of every contestant, from the same weights on the same samples."""
    rows = peers.stage_rows(PEERS, stage)
    assert len(rows) == contestants
    assert rows[0].name == peers.BASELINE == rows[0].baseline
    for row in rows:
        assert row.figures["first_loss"] == pytest.approx(rows[0].figures["first_loss"], rel=1e-5), row.name
        assert row.figures["samples_per_s"] > 0 and row.figures["tokens_per_s"] == pytest.approx(
            row.figures["samples_per_s"] * rows[0].figures["tokens_per_s"] / rows[0].figures["samples_per_s"]
        )
    assert "first loss" in capsys.readouterr().out


@pytest.mark.long
def test_throughput_of_two_processes(tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [*GRAM_BENCHMARK[1:], "throughput", "--stage", "1", "--steps", "1", "--warmup", "0", "--json", str(output)]
    command += "--model tiny --vocab-size 512 --global-batch-size 4 --context-parallel-size 2".split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert row["name"] == "TP1 PP1 CP2 DP1" and row["shape"]["samples"] == 4
    assert row["figures"]["samples_per_s"] == pytest.approx(4 / (row["median_ms"] / 1e3))
    assert row["figures"]["tflops_per_device"] > 0 and "tokens/s" in done.stdout


@pytest.mark.long
def test_saving_in_the_background_is_measured(tmp_path):
    output, flags = tmp_path / "rows.json", "--interval 1 --rounds 1 --model tiny --vocab-size 600 --seq-length 512"
    command = [*GRAM_BENCHMARK, "saving", *flags.split(), "--global-batch-size", "2", "--json", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == ["no saving", "saving"] and rows[1]["time_ratio"] > 0
    assert rows[1]["figures"]["checkpoint_bytes"] > 12 * 600 * rows[1]["shape"]["hidden"]


@pytest.mark.long
def test_planned_memory_is_compared_with_two_processes():
    """The layouts of the benchmark itself are larger than this one, and predicted within 3 %."""
    flags = "--tensor-model-parallel-size 2 --sequence-parallel --num-layers 2 --hidden-size 128 --ffn-hidden-size 256"
    rows = planned_memory.compare(planned_memory.Case("small", 2, planned_memory.STAGE_1 + flags))
    assert [row.process for row in rows] == [0, 1]
    assert all(abs(row.error) < 0.1 for row in rows), rows


def test_a_process_that_dies_is_an_error_with_the_hint():
    with pytest.raises(GramError, match="_exit died .* Out of memory[?]"):
        in_new_processes(os._exit, 3, hint="Out of memory?")


def test_gpu_check_keeps_what_a_step_measured_and_what_stopped():
    python = "import json, sys; json.dump({'rows': [{'a': 1}]}, open(sys.argv[-1], 'w'))"
    outcome, rows = gpu_check.run_step(gpu_check.Step("good", ["-c", python], 60), 60)
    assert rows == [{"a": 1}] and outcome["exit_status"] == 0 and "output" not in outcome
    outcome, rows = gpu_check.run_step(gpu_check.Step("bad", ["-c", "raise SystemExit('why')"], 60), 60)
    assert rows == [] and outcome["exit_status"] == 1 and "why" in outcome["output"]
    outcome, _ = gpu_check.run_step(gpu_check.Step("slow", ["-c", "import time; time.sleep(60)"], 60), 1)
    assert outcome["exit_status"] == "stopped after 1 s"


def test_gpu_check_tells_skipped_tests_with_their_reasons(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\ndef test_one(): pass\n\n"
        "@pytest.mark.skip(reason='needs two GPUs')\n@pytest.mark.parametrize('a', [1, 2])\ndef test_two(a): pass\n"
    )
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-c", "/dev/null", str(tmp_path)]
    outcome, rows = gpu_check.run_step(gpu_check.Step("tests", command, 60, benchmark=False), 60)
    assert outcome["exit_status"] == 0 and outcome["summary"].startswith("1 passed, 2 skipped") and rows == []
    assert outcome["skipped"] == [{"what": "2 tests of test_some.py", "why": "needs two GPUs"}]


WRITES_AT_CTRL_C = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "300"])
print("child", child.pid, flush=True)
try:
    time.sleep(300)
except KeyboardInterrupt:
    cases = '<testcase classname="tests.gpu.test_a"><skipped message="no CUDA device"/></testcase>'
    open(sys.argv[-1].split("=")[1], "w").write(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    raise
"""


def test_an_interrupted_step_keeps_its_report_and_leaves_no_child():
    """The parent ignores interrupts, as a shell's background job does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome, _ = gpu_check.run_step(gpu_check.Step("tests", ["-c", WRITES_AT_CTRL_C], 60, benchmark=False), 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome["exit_status"] == "stopped after 3 s" and "KeyboardInterrupt" in outcome["output"]
    assert outcome["skipped"] == [{"what": "1 test of tests/gpu/test_a.py", "why": "no CUDA device"}]
    status = Path(f"/proc/{re.search('child ([0-9]+)', outcome['output'])[1]}/status")
    deadline = time.monotonic() + 10
    while status.is_file() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)


def test_gpu_check_notes_what_it_leaves_out():
    content = {"steps": [], "rows": [], "skipped": []}
    step = gpu_check.Step("losses", ["-c", "pass"], 60)
    gpu_check.add(content, step, 100, gpu_check.Check(only="tests"))
    gpu_check.add(content, step, 9, gpu_check.Check(minutes=2.5))
    gpu_check.add(content, step, 100, gpu_check.Check(only="loss"))
    assert [part["why"] for part in content["skipped"]] == ["--only tests", "no time was left of --minutes 2.5"]
    assert [(done["name"], done["exit_status"]) for done in content["steps"]] == [("losses", 0)]


def test_gpu_check_steps():
    options = gpu_check.Check(test_seconds=300, benchmark_seconds=50)
    found = {step.name: step for step in gpu_check.steps(options, has_transformer_engine=False)}
    assert found["tests"].limit == 300 and found["throughput llama-3.2-1b stage 2"].limit == 50
    for stage in ("1", "2"):  # 3B: 78.6 of an H100's 79.1 GiB without recompute
        assert "--recompute-granularity full" in " ".join(found[f"throughput llama-3.2-3b stage {stage}"].command)
    assert not any("fp8" in name for name in found)
    assert any("fp8" in step.name for step in gpu_check.steps(options, has_transformer_engine=True))


def test_absent_packages_and_other_versions_are_told(monkeypatch):
    absent = {part["what"] for part in gpu_check.missing_packages()}
    assert absent == {name for name in gpu_check.PACKAGES if importlib.util.find_spec(name) is None}
    monkeypatch.setattr(offline, "pins", lambda file: {"torch": "1.0", "numpy": numpy.__version__, "not-there": "1.0"})
    # PyPI's build has no "+cu130" in its metadata, which torch.__version__ has.
    assert offline.differences() == {"torch": f"{importlib.metadata.version('torch')}, pinned 1.0"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_check_takes_its_flags_and_refuses_without_a_gpu(tmp_path, capsys):
    flags = ["--offline", "--minutes", "9", "--test-seconds", "400", "--output", str(tmp_path / "gpu.json")]
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(flags)
    assert stopped.value.code == 2 and "torch finds no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_page_of_one_file_names_what_was_skipped(tmp_path):
    content = {
        "date": "2026-01-02T00:00:00", "versions": {"torch": "2"}, "gpu": "NVIDIA H100", "driver": "1", "offline": True,
        "rows": [], "steps": [{"name": "losses", "command": "python a", "exit_status": 1}],
        "skipped": [{"what": "flash_attn", "why": "not installed"}, {"what": "peers", "why": "--only losses"}],
    }  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    text = results.write_page_of(tmp_path / "gpu.json").read_text()
    assert (tmp_path / "gpu.md").read_text() == text and "- losses: exit status 1" in text
    assert "- flash_attn: not installed\n- peers: --only losses\n" in text and "(`--offline`)" in text


def test_page_shows_every_results_file(tmp_path):
    base = dict(benchmark="stage 2 training step", shape={"tokens": 4}, dtype="float32", device="d", repeats=1, peak_bytes=None)
    rows = [
        {**base, "name": name, "baseline": "slow", "median_ms": ms, "time_ratio": ratio, "memory_ratio": None}
        for name, ms, ratio in (("slow", 10.0, 1.0), ("fast", 2.0, 5.0))
    ]
    content = {"date": "2026-01-02T00:00:00", "versions": {"torch": "2"}, "command": "gram benchmark peers", "rows": rows}
    (tmp_path / "peers-cpu.json").write_text(json.dumps(content))
    text = results.write_page(tmp_path).read_text()
    assert "No GPU has run these yet" in text and "peers-cpu" in text and "5.00x" in text
    assert (tmp_path / "plots" / "peers-cpu.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results").mkdir()
    step = {"name": "tests", "command": "python -m pytest", "exit_status": 0, "summary": "3 passed"}
    found = {**content, "gpu": "NVIDIA H200", "driver": "1", "steps": [step]}
    (tmp_path / "results" / "2026-01-02-nvidia-h200.json").write_text(json.dumps(found))
    text = results.write_page(tmp_path).read_text()
    assert "3 passed" in text and "NVIDIA H200, driver 1" in text and "No GPU" not in text
