"""Hugging Face folder -> checkpoint -> Hugging Face folder by `gram convert`, the pair-logit head, and errors."""

import itertools
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gram_engine.convert import command, export_hf, jobs
from gram_engine.convert.import_checkpoint import import_checkpoint
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.hf.gram_config import PAIR_LOGIT
from gram_engine.hf.safetensors_file import SafetensorsReader, SafetensorsWriter
from gram_engine.scoring.scorer import RewardModelScorer
from tests.conftest import TEMPLATE
from tests.support.hf_models import write_hf_model
from tests.support.pool import run_alone
from tests.support.tiny import tiny_trainer

GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6}


def write_source(folder, tiny_data, kind="llama3-8", tied=False, dtype=torch.float32):
    """A folder like a downloaded one: weights, a configuration with additional fields, tokenizer."""
    tokenizer = Tokenizer.load("auto", tiny_data["tokenizer"])
    write_hf_model(folder, tokenizer.vocab_size, tied, kind, dtype)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 5], "note": "kept"}))
    return folder


def run(*arguments):
    command.main([str(argument) for argument in arguments])


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def weights_of(prefix, tokenizer, start):
    """The initial parameters of this process in a run."""
    from gram_engine.config.parse import parse
    from gram_engine.model.shapes import resolve_shape

    text = f"--seq-length 192 --global-batch-size 8 --train-iters 4 --data-path {prefix} --tokenizer-model {tokenizer} {start}"
    config = parse(text.split())
    resolve_shape(config)
    if config.checkpoint.pretrained_checkpoint:
        config.model.load_hf = None
    return [part.detach().clone() for chunk in tiny_trainer(config).model for part in chunk.parameters()]


@pytest.mark.parametrize("kind, tied, dtype", [("llama3-8", False, "float32"), ("qwen3", True, "bfloat16")])
def test_folder_to_checkpoint_and_back(kind, tied, dtype, pool, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "MAX_FILE_BYTES", 60_000)
    source = write_source(tmp_path / "source", tiny_data, kind, tied, getattr(torch, dtype))
    in_parts = ("--template", TEMPLATE, "--verify", "--processes", 2 if dtype == "float32" else 1)
    run("import", "--hf-path", source, "--megatron-path", tmp_path / "run", *in_parts)
    checkpoint = tmp_path / "run" / "iter_0000000"
    assert f"wrote {checkpoint}" in capsys.readouterr().out and len(list(checkpoint.glob("__*.distcp"))) > 3

    flags = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2" + (" --bf16" if dtype == "bfloat16" else "")
    starts = (f"--load-hf {source}", f"--config {checkpoint}/run_config.yaml --pretrained-checkpoint {checkpoint}")
    data = (tiny_data["stage2"], tiny_data["tokenizer"])
    for wanted, found in zip(*(pool.run(weights_of, 4, *data, f"{start} {flags}") for start in starts), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))

    monkeypatch.setattr(jobs, "MAX_FILE_BYTES", 1 << 30)
    run("export", "--megatron-path", tmp_path / "run", "--hf-path", tmp_path / "out", "--verify")
    assert_same_weights(source, tmp_path / "out")
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert theirs == {name: ours[name] for name in theirs}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((source / name).read_text()) == json.loads((tmp_path / "out" / name).read_text()), name


@pytest.mark.parametrize("kind, tied", [("llama3-32", True), ("qwen3", False)])
def test_pair_logit_head_is_the_margin(kind, tied, tiny_data, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = write_source(tmp_path / "source", tiny_data, kind, tied)
    import_checkpoint(source, tmp_path / "run", template=str(TEMPLATE))
    run("--load", tmp_path / "run", "--save", tmp_path / "lm")
    run("--load", tmp_path / "run", "--save", tmp_path / "head", "--head", PAIR_LOGIT, "--verify")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "head")
    scorer = RewardModelScorer.from_pretrained(tmp_path / "lm")
    comparison = ("one", "red blue", "green")
    with torch.no_grad():
        logit = model(**tokenizer(scorer.template.judge(*comparison), return_tensors="pt")).logits
    assert logit.shape == (1, 1)
    assert float(logit) == pytest.approx(scorer.margins([comparison])[0], abs=1e-5)
    same = RewardModelScorer.from_pretrained(tmp_path / "head")
    np.testing.assert_allclose(same.margins([comparison]), scorer.margins([comparison]), atol=1e-5)


def test_measured_figures_go_into_the_model_card(tiny_data, tmp_path):
    source = write_source(tmp_path / "source", tiny_data)
    import_checkpoint(source, tmp_path / "run", template=str(TEMPLATE))
    (tmp_path / "report.json").write_text(json.dumps({"figures": {"accuracy": 0.8125}, "pairs_judged": 48, "all": {}}))
    run("--load", tmp_path / "run", "--save", tmp_path / "out", "--evaluation", tmp_path / "report.json")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| accuracy | 0.8125 |" in card and "| pairs_judged | 48 |" in card and "num_layers: 6" in card
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list, not a JSON object"):
        export_hf.export_hf(tmp_path / "run", tmp_path / "again", evaluation=str(tmp_path / "report.json"))


def test_verify_finds_a_changed_bit(tiny_data, tmp_path):
    source = write_source(tmp_path / "source", tiny_data)
    path = import_checkpoint(source, tmp_path / "run", template=str(TEMPLATE))
    folder = export_hf.export_hf(path, tmp_path / "out")
    config = export_hf.run_config_of(path)
    (job,) = export_hf._jobs(path, folder, config.model, torch.float32, "causal-lm")
    export_hf._verify_shard(job)
    content = bytearray((folder / job.file).read_bytes())
    content[-1000] ^= 1
    (folder / job.file).write_bytes(content)
    with pytest.raises(CheckpointError, match="differs from the checkpoint after it was written"):
        export_hf._verify_shard(replace(job))


def test_a_full_disk_is_detected_before_writing(tiny_data, tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", tiny_data)
    path = import_checkpoint(source, tmp_path / "run", template=str(TEMPLATE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ConfigError, match="GB are needed, .* free. Make room first"):
        export_hf.export_hf(path, tmp_path / "out")
    with pytest.raises(ConfigError, match="GB are needed"):
        import_checkpoint(source, tmp_path / "again", template=str(TEMPLATE))
    assert not (tmp_path / "out").exists() and not (tmp_path / "again").exists()


def main_killed_in_the_middle(arguments):
    calls = itertools.count(1)

    def or_die(function):
        def call(*arguments):
            if next(calls) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    SafetensorsWriter.write, torch.save = or_die(SafetensorsWriter.write), or_die(torch.save)
    command.main(arguments)


def test_a_killed_conversion_leaves_no_complete_output_and_the_next_one_succeeds(tiny_data, tmp_path):
    source = write_source(tmp_path / "source", tiny_data)
    to_engine = ["--from", "hf", "--load", source, "--save", tmp_path / "run", "--template", TEMPLATE]
    to_hf = ["--load", tmp_path / "whole", "--save", tmp_path / "out"]
    run(*to_engine[:-4], "--save", tmp_path / "whole", "--template", TEMPLATE)
    for arguments in (to_engine, to_hf):
        status, output = run_alone(main_killed_in_the_middle, [*map(str, arguments)])
        assert status == -signal.SIGKILL, output
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "run").glob("**/.metadata")) and not list((tmp_path / "run").glob("*.txt"))
    run(*to_hf)
    run(*to_engine)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from", "hf", "--to", "hf", "--load", "x", "--save", "y"], "nothing to convert"),
        (["--load", "x", "--save", "y", "--processes", "0"], "--processes 0 must be at least 1"),
        (["--load", "x", "--save", "y"], "x: no checkpoint here"),
        (["import", "--hf-path", "x", "--megatron-path", "y"], "config.json: no such file"),
    ],
)
def test_wrong_commands_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_damaged_sources_are_named(tiny_data, tmp_path):
    source = write_source(tmp_path / "source", tiny_data)
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="is cut off"):
        import_checkpoint(source, tmp_path / "run", template=str(TEMPLATE))
    file.write_bytes(whole)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="the engine reads 'llama' and 'qwen3'"):
        import_checkpoint(source, tmp_path / "run", template=str(TEMPLATE))
    file.rename(source / "model-1.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="is not a safetensors file in the folder"):
        import_checkpoint(source, tmp_path / "run", template=str(TEMPLATE))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_files_are_those_of_the_safetensors_library(dtype, tmp_path):
    tensors = {"b": torch.randn(7, 5).to(dtype), "a": torch.randn(3).to(dtype), "c": torch.randn(2, 0).to(dtype)}
    writer = SafetensorsWriter(tmp_path / "ours", {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype)
    for name, tensor in tensors.items():
        writer.write(name, tensor.t().contiguous().t() if name == "b" else tensor)
    writer.close()
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])
    save_file(tensors, tmp_path / "theirs")
    reader = SafetensorsReader(tmp_path / "theirs")
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)
    assert torch.equal(reader.read("b", (2, 5)), tensors["b"][2:5])
    assert torch.equal(reader.read("b", (2, 5), (1, 4)), tensors["b"][2:5, 1:4])
