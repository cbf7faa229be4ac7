"""The benchmarks measure the same arithmetic for every contestant, and write what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gram_engine.benchmarks import losses
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
