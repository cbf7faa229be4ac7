"""Hugging Face LLaMA in and out: logits equal transformers', and a round trip at any layout is exact to the bit."""

import json

import pytest
import torch

from tests.tiny import tiny_trainer

SCALINGS = {
    "plain": None,
    "llama3-8": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    "llama3-32": dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
}


def write_hf_model(folder, vocab_size, tied, scaling, dtype=torch.float32):
    """A random LLaMA saved by transformers itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if SCALINGS[scaling]:
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, **SCALINGS[scaling]}
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model.eval()


def packed_logits(prefix, tokenizer, folder, lengths, tokens):
    """Logits [tokens, vocabulary] of two packed sequences by the engine's model, loaded from a Hugging Face folder."""
    from megatron.core.packed_seq_params import PackedSeqParams

    trainer = tiny_trainer(hf_run(prefix, tokenizer, folder))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        logits = trainer.model[0].module(tokens[None], positions[None], None, packed_seq_params=packed)
    return logits[0, :, : trainer.config.model.vocab_size]


def hf_run(prefix, tokenizer, folder, flags=""):
    """The tiny run's configuration, with the shape and the weights of a Hugging Face folder instead."""
    from gram_engine.config import parse
    from gram_engine.validation import resolve_shape

    run = f"--seq-length 192 --global-batch-size 8 --train-iters 4 --load-hf {folder} {flags}"
    config = parse([*run.split(), "--data-path", prefix, "--tokenizer-model", tokenizer])
    resolve_shape(config)
    return config


def save_untrained(prefix, tokenizer, folder, flags, checkpoint):
    """Load a Hugging Face folder at a layout and save it as a checkpoint, without a training step."""
    trainer = tiny_trainer(hf_run(prefix, tokenizer, folder, f"{flags} --save {checkpoint}"))
    trainer.save()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_equal_transformers(scaling, tied, pool, tiny_data, tmp_path):
    vocab_size = json.load(open(f"{tiny_data['stage2']}.json"))["tokenizer"]["vocab_size"] + 3
    model = write_hf_model(tmp_path / "hf", vocab_size, tied, scaling)
    lengths, generator = [150, 37], torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    with torch.no_grad():
        expected = torch.cat([model(part[None]).logits[0] for part in tokens.split(lengths)])
    found = pool.run(
        packed_logits, 1, tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path / "hf"), lengths, tokens
    )[0]
    assert expected.abs().mean() > 0.1, "logits must not be trivially small"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "processes, flags, tied, dtype",
    [
        (1, "", False, torch.float32),
        (2, "--tensor-model-parallel-size 2 --bf16", True, torch.bfloat16),
        (3, "--pipeline-model-parallel-size 3", True, torch.float32),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", False, torch.float32),
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", False, torch.float32),
    ],
    ids=["one", "tp2-bf16-tied", "pp3-tied", "vpp", "tp2-pp2"],
)
def test_round_trip_is_exact(processes, flags, tied, dtype, pool, tiny_data, tmp_path):
    from safetensors.torch import load_file

    from gram_engine.convert.export_hf import export_hf

    vocab_size = json.load(open(f"{tiny_data['stage2']}.json"))["tokenizer"]["vocab_size"] + 3
    write_hf_model(tmp_path / "hf", vocab_size, tied, "llama3-8", dtype)
    run = (tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path / "hf"), flags, str(tmp_path / "checkpoint"))
    pool.run(save_untrained, processes, *run)
    export_hf(tmp_path / "checkpoint", tmp_path / "out")

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    theirs, ours = (json.load(open(tmp_path / name / "config.json")) for name in ("hf", "out"))
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings", "dtype"):
        assert theirs[key] == ours[key], key


def test_exported_folder_loads_with_transformers_and_scores_without_padding_effects(pool, tiny_data, tmp_path):
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gram_engine.convert.export_hf import export_hf
    from gram_engine.scoring.scorer import RewardModelScorer

    vocab_size = json.load(open(f"{tiny_data['stage2']}.json"))["tokenizer"]["vocab_size"]
    write_hf_model(tmp_path / "hf", vocab_size, False, "plain")
    run = (tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path / "hf"), "", str(tmp_path / "checkpoint"))
    pool.run(save_untrained, 1, *run)
    folder = export_hf(tmp_path / "checkpoint", tmp_path / "out")

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scorer = RewardModelScorer.from_pretrained(folder)
    comparisons = [("one", "red blue", "green"), ("two " * 20, "stone " * 30, "river"), ("three", "a", "b")]
    together = scorer.margins(comparisons)
    alone = np.array([scorer.margins([comparison])[0] for comparison in comparisons])
    np.testing.assert_allclose(together, alone, atol=1e-5)

    # The margin is the difference of the two label tokens' logits of the text as any server would tokenise it.
    text = scorer.template.judge(*comparisons[0])
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    label_a, label_b = json.load(open(folder / "gram_config.json"))["label_ids"]
    assert together[0] == pytest.approx(float(logits[label_a] - logits[label_b]), abs=1e-4)

    rewards = scorer.score_pairs([comparisons[0], (comparisons[0][0], comparisons[0][2], comparisons[0][1])])["reward_a"]
    assert rewards.sum() == pytest.approx(1.0)


def test_errors_name_what_does_not_fit(tmp_path):
    from gram_engine.convert.import_hf import HuggingFaceFolder
    from gram_engine.errors import CheckpointError, ConfigError
    from gram_engine.model.presets import shape_from_hf

    with pytest.raises(ConfigError, match="config.json: no such file. --load-hf needs"):
        shape_from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model_type is 'gpt2'; the engine reads 'llama'"):
        shape_from_hf(tmp_path)
    with pytest.raises(CheckpointError, match="neither model.safetensors.index.json nor model.safetensors"):
        HuggingFaceFolder(tmp_path)
