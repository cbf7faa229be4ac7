"""Flags for GPUs, as far as a machine without one can show: refusals, padding, layers with state of their own."""

import importlib.util

import pytest
import torch

from gram_engine.config.parse import parse
from gram_engine.data.context_parallel import held_positions
from gram_engine.errors import ConfigError
from gram_engine.model.shapes import resolve_shape
from tests.support.resume import resumed, uninterrupted
from tests.support.tiny import tiny_config, tiny_trainer, train_steps

SHAPE = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8 --seq-length 512"
NO_TE = not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None


@pytest.mark.skipif(not NO_TE, reason="this machine has a GPU and Transformer Engine: nothing to refuse")
@pytest.mark.parametrize(
    "flags",
    [
        "--transformer-impl transformer_engine",
        "--bf16 --fp8-format hybrid",
        "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap",
    ],
)
def test_transformer_engine_is_asked_for_where_there_is_none(flags, tiny_data, capsys, monkeypatch):
    """By the command itself, before any process group starts."""
    from gram_engine.training.main import finetune

    monkeypatch.setenv("WORLD_SIZE", "2" if "parallel" in flags else "1")
    data = ["--data-path", tiny_data["stage2"], "--tokenizer-model", tiny_data["tokenizer"], "--train-iters", "1"]
    with pytest.raises(SystemExit):
        finetune([*SHAPE.split(), *flags.split(), *data])
    message = capsys.readouterr().err
    assert flags.split(" --")[-1].split()[0].lstrip("-") in message and "Leave it out to train with local layers" in message


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("", 1),
        ("--tensor-model-parallel-size 2", 1),
        ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("--context-parallel-size 2", 4),
        ("--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel", 8),
        ("--fp8-format hybrid", 16),
        ("--fp8-format hybrid --fp8-recipe mxfp8 --tensor-model-parallel-size 2", 32),
        ("--fp8-format e4m3 --fp8-recipe blockwise --context-parallel-size 2", 256),
        ("--fp8-format hybrid --tensor-model-parallel-size 2 --sequence-parallel", 32),
        ("--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap --micro-batch-size 3", 3 * 512),
    ],
)
def test_packs_are_padded_so_that_each_share_fits_its_kernels(flags, wanted):
    config = parse([*SHAPE.split(), *flags.split()])
    resolve_shape(config)
    assert config.pack_multiple == wanted


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_processes_share_a_pack_and_its_causal_work(size):
    bounds = torch.tensor([0, 2 * size, 8 * size, 18 * size], dtype=torch.int32)
    held = [held_positions(bounds, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(18 * size))
    position = torch.cat([torch.arange(length) for length in bounds.diff().tolist()])
    work = [int((position[places] + 1).sum()) for places in held]
    assert len(set(work)) == 1, "keys seen by each process's queries"


def stateful_norm(function, *args):
    """Call it with norms that have state beside their parameters, as Transformer Engine's modules do."""
    from gram_engine.model.layers import RMSNorm

    RMSNorm.get_extra_state = lambda self: torch.tensor([7])
    RMSNorm.set_extra_state = lambda self, state: None
    try:
        return function(*args)
    finally:
        del RMSNorm.get_extra_state, RMSNorm.set_extra_state


@pytest.mark.parametrize("with_state", ["writer", "reader"])
def test_checkpoints_pass_between_layers_with_and_without_extra_state(with_state, pool, tiny_data, tmp_path):
    data = (tiny_data["stage2"], tiny_data["tokenizer"], "", str(tmp_path))
    if with_state == "writer":
        expected, found = pool.run(stateful_norm, 1, uninterrupted, *data)[0], pool.run(resumed, 1, *data)[0]
    else:
        expected, found = pool.run(uninterrupted, 1, *data)[0], pool.run(stateful_norm, 1, resumed, *data)[0]
    assert found == expected


def deterministic(prefix, tokenizer, flags):
    from gram_engine.platform.device import make_deterministic

    make_deterministic()
    try:
        return train_steps(tiny_trainer(tiny_config(prefix, tokenizer, f"--deterministic-mode {flags}")), 3)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stage, objective", [("stage1", "response-lm"), ("stage2", "pair-preference")])
def test_deterministic_mode_finds_no_kernel_that_is_not(stage, objective, pool, tiny_data):
    arguments = (tiny_data[stage], tiny_data["tokenizer"], f"--objective {objective} --context-parallel-size 2")
    first = pool.run(deterministic, 2, *arguments)
    assert first == pool.run(deterministic, 2, *arguments)


def test_layernorm_recompute_without_transformer_engine_is_refused(tiny_data):
    from gram_engine.model.te_layers import check_gpu
    from gram_engine.platform.device import CPU, Platform

    flags = "--recompute-granularity selective --recompute-modules core_attn layernorm"
    with pytest.raises(ConfigError, match="--recompute-modules layernorm needs Transformer Engine's layers"):
        check_gpu(tiny_config(tiny_data["stage2"], tiny_data["tokenizer"], flags), Platform(CPU, "gloo"))
