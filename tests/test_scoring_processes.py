"""Several processes score one file: the rows are shared out, and the result is that of one process, also after a kill."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
from torch.distributed import TCPStore

from gram_engine.evaluation import best_of_n, evaluate
from gram_engine.scoring import command
from gram_engine.scoring.processes import Processes
from gram_engine.scoring.scorer import RewardModelScorer
from tests.conftest import TEMPLATE
from tests.support.pool import run_alone
from tests.support.reward_folder import write_reward_model

COMMANDS = {"score": command.main, "rank": command.rank_main, "evaluate": evaluate.main, "best-of-n": best_of_n.main}


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    return write_reward_model(tmp_path_factory.mktemp("model") / "model", tiny_data["tokenizer"], TEMPLATE, 192)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{command: file of rows of very different lengths}"""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("rows")

    def text():
        return " ".join(draw.choices(["red", "stone", "quiet", "river"], k=draw.choice((1, 3, 30))))

    pairs = [{"prompt": f"{number} {text()}", "chosen": text(), "rejected": text() + "."} for number in range(17)]
    lists = [{"prompt": f"{number} {text()}", "responses": [text() for _ in range(4)]} for number in range(9)]
    scored = [{**row, "oracle": [1, 2, 3, 4]} for row in lists]
    for name, rows in {"score": pairs, "rank": lists, "evaluate": pairs, "best-of-n": scored}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in COMMANDS}


def one_of_several(name, arguments, rank, count, port, kill_rank):
    """What one process of torchrun runs; `kill_rank` dies in its third batch."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    threading.Thread(target=die_with_the_others, args=(port,), daemon=True).start()
    run, batches = RewardModelScorer._run, itertools.count(1)

    def run_or_die(self, tree):
        if rank == kill_rank and next(batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, tree)

    RewardModelScorer._run = run_or_die
    COMMANDS[name](arguments)


def die_with_the_others(port):
    """Torchrun ends all processes when one has failed; the test says so through the store."""
    TCPStore("localhost", port, is_master=False).wait(["one has failed"], timedelta(seconds=120))
    os._exit(1)


def run_processes(name, arguments, count, kill_rank=None):
    """[(exit code, output)] of each process. The store is here, and when a process fails the others end, as with torchrun."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def run(rank):
        status, output = run_alone(one_of_several, name, arguments, rank, count, store.port, kill_rank)
        if status != 0:
            time.sleep(1)
            store.set("one has failed", "")
        return status, output

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def words(name, files, folder, out):
    """(arguments, result file)"""
    more = ["--model", str(folder), "--batch-tokens", "100"]
    if name in ("score", "rank"):
        return [files[name], str(out / "out.jsonl"), *more], out / "out.jsonl"
    result = {"evaluate": "scores.jsonl", "best-of-n": "proxy.jsonl"}[name]
    return [files[name], "--output-dir", str(out), *more], out / result


def assert_same_lines(found, wanted):
    found, wanted = ([json.loads(line) for line in file.read_text().splitlines()] for file in (found, wanted))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert one.keys() == other.keys()
        for key in one:
            if isinstance(one[key], (float, list)):
                np.testing.assert_allclose(one[key], other[key], atol=1e-5)
            else:
                assert one[key] == other[key] or key == "place"


@pytest.mark.parametrize("name", COMMANDS)
def test_three_processes_write_what_one_writes(name, files, folder, tmp_path):
    arguments, result = words(name, files, folder, tmp_path / "several")
    done = run_processes(name, arguments, 3)
    assert [status for status, _ in done] == [0, 0, 0], done
    assert done[0][1] and not done[1][1] and not done[2][1], "the first process alone prints"
    alone, wanted = words(name, files, folder, tmp_path / "one")
    COMMANDS[name](alone)
    assert_same_lines(result, wanted)
    assert {path.name for path in result.parent.iterdir()} == {path.name for path in wanted.parent.iterdir()}


@pytest.mark.parametrize("kill_rank", [0, 1])
def test_a_killed_process_and_another_number_of_processes(kill_rank, files, folder, tmp_path):
    arguments, result = words("score", files, folder, tmp_path / "several")
    done = run_processes("score", arguments, 2, kill_rank)
    assert done[kill_rank][0] == -signal.SIGKILL and not result.exists(), done
    partial = sorted(result.parent.glob("out.jsonl.partial*"))
    kept = [line for part in partial if part.suffix != ".json" for line in part.read_text().splitlines()]
    assert 0 < len(kept) < 17, partial

    scored, make_lines = [], command._score_lines

    def recorded(scorer, own, numbers):
        scored.extend(numbers)
        return make_lines(scorer, own, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_score_lines", recorded)
        command.main(arguments)
    assert len(scored) == 17 - len(kept) and not {json.loads(line)[0] for line in kept} & set(scored)
    alone, wanted = words("score", files, folder, tmp_path / "one")
    command.main(alone)
    assert_same_lines(result, wanted)
    assert list(result.parent.iterdir()) == [result]


def test_rows_are_shared_out_by_length():
    sizes = [random.Random(seed).choice((1, 5, 300, 2000)) for seed in range(101)]
    numbers = list(range(100, 201))
    parts = []
    for rank in range(4):
        processes = Processes("x")
        processes.rank, processes.count = rank, 4
        parts.append(processes.own_part(numbers, sizes))
    assert sorted(itertools.chain(*parts)) == numbers and all(part == sorted(part) for part in parts)
    loads = [sum(sizes[number - 100] for number in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.long
def test_torchrun(files, folder, tmp_path):
    arguments, result = words("score", files, folder, tmp_path / "several")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gram_engine.cli"]
    done = subprocess.run([*launch, "score", *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"] == 17
    alone, wanted = words("score", files, folder, tmp_path / "one")
    command.main(alone)
    assert_same_lines(result, wanted)
