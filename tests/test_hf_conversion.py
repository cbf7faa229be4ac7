"""Hugging Face LLaMA in and out: logits equal transformers', and a round trip at any layout is exact, bit for bit."""

import json

import pytest
import torch

from gram_engine.errors import CheckpointError, ConfigError
from tests.support.cases import short_first
from tests.support.hf_models import KINDS, write_hf_model
from tests.support.layouts import LAYOUTS
from tests.support.packed_logits import hf_run, packed_logits
from tests.support.tiny import tiny_trainer


def save_untrained(prefix, tokenizer, folder, flags, checkpoint):
    """Load a Hugging Face folder at a layout and save it as a checkpoint, without a training step."""
    trainer = tiny_trainer(hf_run(prefix, tokenizer, folder, f"{flags} --save {checkpoint}"))
    trainer.save()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind, tied, pool, tiny_data, tmp_path):
    vocab_size = json.load(open(f"{tiny_data['stage2']}.json"))["tokenizer"]["vocab_size"] + 3
    model = write_hf_model(tmp_path / "hf", vocab_size, tied, kind)
    lengths, generator = [150, 37], torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    with torch.no_grad():
        expected = torch.cat([model(part[None]).logits[0] for part in tokens.split(lengths)])
    found = pool.run(packed_logits, 1, tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path / "hf"), lengths, tokens)[0]
    assert expected.abs().mean() > 0.1, "logits must not be trivially small"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


SHAPES = [("llama3-8", False), ("llama3-32", True), ("qwen3", False)]
ROUND_TRIPS = [
    *((layout, kind, tied, torch.float32) for layout in ("one", "tp2", "pp2", "tp2-pp2") for kind, tied in SHAPES),
    ("tp2", "qwen3", True, torch.bfloat16),
    ("pp2-vpp3", "llama3-8", False, torch.float32),
    ("pp3", "llama3-8", True, torch.float32),
]
SHORT = [ROUND_TRIPS[number] for number in (1, 3, 8, 10, 12, 13)]


@pytest.mark.parametrize("layout, kind, tied, dtype", short_first(SHORT, ROUND_TRIPS))
def test_round_trip_is_exact(layout, kind, tied, dtype, pool, tiny_data, tmp_path):
    from safetensors.torch import load_file

    from gram_engine.convert.export_hf import export_hf

    vocab_size = json.load(open(f"{tiny_data['stage2']}.json"))["tokenizer"]["vocab_size"] + 3
    write_hf_model(tmp_path / "hf", vocab_size, tied, kind, dtype)
    processes, flags = LAYOUTS[layout]
    flags += " --bf16" if dtype == torch.bfloat16 else ""
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


def embedding_copies(prefix, tokenizer, folder, flags):
    """This rank's copies of the tied embedding, one for each model chunk that has one."""
    trainer = tiny_trainer(hf_run(prefix, tokenizer, folder, flags))
    bare = [chunk.module for chunk in trainer.model]
    return [chunk.shared_embedding_or_output_weight().detach() for chunk in bare if chunk.pre_process or chunk.post_process]


def test_tied_embedding_is_filled_on_first_and_last_stage(pool, tiny_data, tmp_path):
    from safetensors.torch import load_file

    vocab_size = 545
    write_hf_model(tmp_path / "hf", vocab_size, True, "plain")
    wanted = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    flags = "--pipeline-model-parallel-size 2 --no-fused-losses"
    run = (tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path / "hf"), flags)
    found = pool.run(embedding_copies, 2, *run)
    assert [len(copies) for copies in found] == [1, 1]
    for (copy,) in found:
        assert torch.equal(copy[:vocab_size], wanted)
        assert not copy[vocab_size:].any(), "padding rows are zero"


def test_export_in_shards_and_another_dtype_loads_with_transformers(pool, tiny_data, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gram_engine.convert import command, export_hf, jobs
    from gram_engine.data.tokenizer import Tokenizer

    monkeypatch.setattr(jobs, "MAX_FILE_BYTES", 40_000)
    vocab_size = json.load(open(f"{tiny_data['stage2']}.json"))["tokenizer"]["vocab_size"]
    original = write_hf_model(tmp_path / "hf", vocab_size, True, "llama3-32")
    run = (tiny_data["stage2"], tiny_data["tokenizer"], str(tmp_path / "hf"), "", str(tmp_path / "checkpoint"))
    pool.run(save_untrained, 1, *run)
    command.main(
        ["--from", "engine", "--to", "hf", "--load", str(tmp_path / "checkpoint"), "--save", str(tmp_path / "out")]
        + ["--dtype", "bfloat16"]
    )

    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor.bfloat16(), model.state_dict()[name]), name
    assert model.config.rope_parameters == original.config.rope_parameters
    text = "Naïve  café\n\t<s> 你好"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False).input_ids
    assert ids == Tokenizer.load("auto", tiny_data["tokenizer"]).encode(text)

    with pytest.raises(ConfigError, match="out exists. Remove it, or give another --save"):
        export_hf.export_hf(tmp_path / "checkpoint", tmp_path / "out")
    (part,) = (tmp_path / "checkpoint").glob("iter_*/__0_0.distcp")
    part.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        export_hf.export_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert not [path for path in tmp_path.iterdir() if "again" in path.name], "no incomplete folder remains"


def test_scores_of_an_exported_folder_equal_those_by_transformers(pool, tiny_data, tmp_path):
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
    comparison = ("one", "red blue", "green")

    # The margin is the difference of the two label tokens' logits, with the text tokenised as by any server.
    text = scorer.template.judge(*comparison)
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    label_a, label_b = json.load(open(folder / "gram_config.json"))["label_ids"]
    assert scorer.margins([comparison])[0] == pytest.approx(float(logits[label_a] - logits[label_b]), abs=1e-4)
