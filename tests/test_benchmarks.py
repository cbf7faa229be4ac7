"""The benchmarks measure the same arithmetic for every contestant, and write what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gram_engine.benchmarks import gpu_check, losses, page, peers
from gram_engine.benchmarks.measure import MEMORY_FLOOR, PeakMemory, Row, add_ratios, measure, table

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


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
    command = [sys.executable, "tools/benchmark_losses.py", "--shapes", "tiny", "--repeats", "1", "--steps", "--step-models",
               "tiny", "--step-tokens", "256", "--json", str(output)]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    assert "megatron-core vocab-parallel cross entropy" in done.stdout and "tokens/s" in done.stdout
    content = json.loads(output.read_text())
    assert content["versions"]["torch"] == torch.__version__ and "--shapes tiny" in content["command"]
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


PEERS = peers.Benchmark(
    shape="--num-layers 2 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 --num-query-groups 2", vocab_size=512,
    dtype="float32", seq_length=512, global_batch_size=8, pack=2, steps=1, warmup=1, trl=False,
)  # fmt: skip


@pytest.mark.parametrize("stage", ["1", "2"])
def test_peers_do_the_same_work(stage, capsys):
    """The first step's loss of every contestant, from the same weights on the same samples."""
    rows = peers.stage_rows(PEERS, stage)
    assert len(rows) == {"1": 4, "2": 5}[stage]
    assert rows[0].name == peers.BASELINE == rows[0].baseline
    for row in rows:
        assert row.figures["first_loss"] == pytest.approx(rows[0].figures["first_loss"], rel=1e-5), row.name
        assert row.figures["samples_per_s"] > 0 and row.figures["tokens_per_s"] == pytest.approx(
            row.figures["samples_per_s"] * rows[0].figures["tokens_per_s"] / rows[0].figures["samples_per_s"]
        )
    assert "first loss" in capsys.readouterr().out


def test_throughput_of_two_processes(tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tools/benchmark_throughput.py", "--stage", "1", "--steps", "1", "--warmup", "0", "--json", str(output)]
    command += "--model tiny --vocab-size 512 --global-batch-size 4 --context-parallel-size 2".split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert row["name"] == "TP1 PP1 CP2 DP1" and row["shape"]["samples"] == 4
    assert row["figures"]["samples_per_s"] == pytest.approx(4 / (row["median_ms"] / 1e3))
    assert row["figures"]["tflops_per_device"] > 0 and "tokens/s" in done.stdout


def test_gpu_check_keeps_what_a_step_measured_and_what_stopped():
    python = "import json, sys; json.dump({'rows': [{'a': 1}]}, open(sys.argv[-1], 'w'))"
    outcome, rows = gpu_check.run_step(gpu_check.Step("good", ["-c", python], 60), 60)
    assert rows == [{"a": 1}] and outcome["exit_status"] == 0 and "output" not in outcome
    outcome, rows = gpu_check.run_step(gpu_check.Step("bad", ["-c", "raise SystemExit('why')"], 60), 60)
    assert rows == [] and outcome["exit_status"] == 1 and "why" in outcome["output"]
    outcome, _ = gpu_check.run_step(gpu_check.Step("slow", ["-c", "import time; time.sleep(60)"], 60), 1)
    assert outcome["exit_status"] == "stopped after 1 s"


def test_page_shows_every_results_file(tmp_path):
    base = dict(benchmark="stage 2 training step", shape={"tokens": 4}, dtype="float32", device="d", repeats=1, peak_bytes=None)
    rows = [
        {**base, "name": name, "baseline": "slow", "median_ms": ms, "time_ratio": ratio, "memory_ratio": None}
        for name, ms, ratio in (("slow", 10.0, 1.0), ("fast", 2.0, 5.0))
    ]
    content = {"date": "2026-01-02T00:00:00", "versions": {"torch": "2"}, "command": "benchmark_peers.py", "rows": rows}
    (tmp_path / "peers-cpu.json").write_text(json.dumps(content))
    text = page.write_page(tmp_path).read_text()
    assert "No GPU has run these yet" in text and "peers-cpu" in text and "5.00x" in text
    assert (tmp_path / "plots" / "peers-cpu.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results").mkdir()
    step = {"name": "tests", "command": "python -m pytest", "exit_status": 0, "summary": "3 passed"}
    found = {**content, "gpu": "NVIDIA H200", "driver": "1", "steps": [step]}
    (tmp_path / "results" / "2026-01-02-nvidia-h200.json").write_text(json.dumps(found))
    text = page.write_page(tmp_path).read_text()
    assert "3 passed" in text and "NVIDIA H200, driver 1" in text and "No GPU" not in text
