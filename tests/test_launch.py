"""Every way to start the trainer that the README names, with the real torchrun; dry runs show what it was told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gram_engine.data import demo
from gram_engine.data.train_tokenizer import TokenizerConfig, train_tokenizer
from gram_engine.training import launch

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
PRETRAIN, FINETUNE = "examples/pretrain_gram.sh", "examples/finetune_gram.sh"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags that name a small data set and its tokenizer."""
    folder = tmp_path_factory.mktemp("launch")
    data = demo.write(demo.DemoConfig(output_dir=str(folder), train_pairs=300, test_pairs=20))[0]
    model = str(folder / "tokenizer.model")
    train_tokenizer(TokenizerConfig(data=(str(data),), output=model, vocab_size=600))
    cache = str(folder / "cache")
    flags = {"config": "examples/configs/tiny.yaml", "data": data, "tokenizer-model": model, "data-cache-path": cache}
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def environment(**extra: str) -> dict[str, str]:
    """This environment without what a torchrun around the tests, or an activated venv, would leave in it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "VIRTUAL_ENV")}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **extra}


def start(*command: str, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*command: str, **extra: str) -> dict:
    """The resolved configuration that a dry run prints."""
    process = start(*command, "--dry-run", **extra)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return yaml.safe_load(output)


# A dry run refuses TP 2 unless there are two processes (or a multiple).
TP2 = ("--tensor-model-parallel-size", "2")


def test_torchrun_reads_the_script_as_python(files):
    config = run(TORCHRUN, "--standalone", "--nproc-per-node", "2", PRETRAIN, *files, *TP2)
    assert config["training"]["objective"] == "response-lm"


@pytest.mark.long
def test_torchrun_no_python_reads_the_script_as_bash(files):
    config = run(TORCHRUN, "--standalone", "--no-python", "--nproc-per-node", "2", FINETUNE, *files, *TP2)
    assert config["training"]["objective"] == "pair-preference"


@pytest.mark.long
def test_bash_starts_torchrun_itself_with_its_flags_among_the_trainers(files):
    config = run("bash", FINETUNE, *files, "--nproc-per-node", "2", *TP2, "--lr", "3e-4")
    assert config["training"]["objective"] == "pair-preference"
    assert config["training"]["lr"] == 3e-4


@pytest.mark.long
def test_bash_takes_the_number_of_processes_from_the_environment(files):
    run("bash", PRETRAIN, *files, *TP2, NPROC_PER_NODE="2")


def test_a_mistake_is_told_once_and_without_a_traceback(files):
    process = start("bash", PRETRAIN, *files, "--tensor-model-parallel-size", "3", "--nproc-per-node", "2", "--dry-run")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("error: ") == 1 and "Traceback" not in errors


@pytest.mark.long
def test_two_launchers_train_as_two_nodes(files, tmp_path):
    flags = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"127.0.0.1:{launch_port()}")
    save = ("--train-iters", "2", "--log-interval", "1", "--save", str(tmp_path / "checkpoint"))
    nodes = [
        start("bash", PRETRAIN, *flags, "--node-rank", str(rank), *files, *TP2, *save, GLOO_SOCKET_IFNAME="lo")
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "step 2/2" in outputs[0][0]
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def launch_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_flags_are_sorted_out():
    flags = "--lr 1e-5 --nnodes 2 --node_rank=1 --data a.jsonl b.jsonl --standalone --save x".split()
    for_torchrun, for_script = launch.split_flags(flags)
    assert for_torchrun == ["--nnodes", "2", "--node_rank=1", "--standalone"]
    assert for_script == "--lr 1e-5 --data a.jsonl b.jsonl --save x".split()


def test_defaults_leave_what_was_given():
    assert launch.with_defaults(["--nproc-per-node=3"]) == ["--standalone", "--nproc-per-node=3"]
    two_nodes = ["--nnodes", "2", "--nproc_per_node", "1"]
    assert launch.with_defaults(two_nodes) == two_nodes
