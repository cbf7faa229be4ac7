"""The mapping table, and the errors for folders that do not fit their configuration."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gram_engine.config.schema import ModelConfig
from gram_engine.errors import CheckpointError
from gram_engine.hf.load_weights import HuggingFaceFolder
from gram_engine.hf.mapping import LAYER_RULES, hf_shapes, rules
from gram_engine.model.shapes import shape_from_hf
from tests.support.hf_models import write_hf_model

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=10,
    ffn_hidden_size=6,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=7,
    untie_embeddings_and_output_weights=True,
)


def test_qkv_is_grouped_as_megatron_core_reads_it():
    q, k, v = (torch.randn(rows, 10) for rows in (12, 6, 6))
    rule = LAYER_RULES[0]
    merged = torch.cat([(q, k, v)[part][first:last] for part, first, last in rule.pieces(MODEL)])
    # SelfAttention.get_query_key_value_tensors: [groups, (queries per group + 2) * dim], split into q, k, v.
    grouped = merged.view(2, 4, 3, 10)
    assert torch.equal(grouped[:, :2].reshape(12, 10), q)
    assert torch.equal(grouped[:, 2].reshape(6, 10), k)
    assert torch.equal(grouped[:, 3].reshape(6, 10), v)
    for back, part in zip(rule.split(merged, MODEL), (q, k, v)):
        assert torch.equal(back, part)


@pytest.mark.parametrize("rule", [rule for rule, layer in rules(MODEL) if not layer], ids=lambda rule: rule.engine)
def test_any_range_of_rows_equals_the_same_range_of_the_whole(rule):
    parts = [torch.randn(shape) for shape in rule.hf_shapes(MODEL)]
    whole = torch.cat([parts[part][first:last] for part, first, last in rule.pieces(MODEL)])
    assert all(torch.equal(back, part) for back, part in zip(rule.split(whole, MODEL), parts))
    for start in range(len(whole)):
        for end in range(start + 1, len(whole) + 3):
            rows = [parts[part][first:last] for part, first, last in rule.pieces_of_rows(start, end, MODEL)]
            assert torch.equal(torch.cat(rows), whole[start:end])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_table_names_exactly_the_tensors_that_transformers_writes(tied, tmp_path):
    write_hf_model(tmp_path, 29, tied, "plain")
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert hf_shapes(ModelConfig(**shape_from_hf(tmp_path))) == stored


def damaged_folder(tmp_path, change, tied=False) -> HuggingFaceFolder:
    write_hf_model(tmp_path, 29, tied, "plain")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight. Download the folder again"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": torch.zeros(80, 48)}),
            r"model.layers.1.self_attn.q_proj.weight has shape \(80, 48\); config.json asks for \(64, 48\)",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.gate_proj.weight": torch.zeros(79, 48)}),
            r"gate_proj.weight has shape \(79, 48\); config.json asks for \(80, 48\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "the engine does not know model.layers.0.self_attn.q_proj.bias",
        ),
    ],
    ids=["missing", "heads", "rows", "bias"],
)
def test_folder_that_does_not_fit_its_config_is_refused(change, message, tmp_path):
    source = damaged_folder(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        source.check(ModelConfig(**shape_from_hf(tmp_path)))


def test_redundant_tensors_are_ignored(tmp_path):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    damaged_folder(tmp_path, repeat, tied=True).check(ModelConfig(**shape_from_hf(tmp_path)))


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither model.safetensors.index.json nor model.safetensors"):
        HuggingFaceFolder(tmp_path)
    write_hf_model(tmp_path, 29, False, "plain")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="model.safetensors: not a whole safetensors file"):
        HuggingFaceFolder(tmp_path)
    file.unlink()
    index = {"weight_map": dict.fromkeys(hf_shapes(ModelConfig(**shape_from_hf(tmp_path))), "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-1.safetensors: no such file. Download the folder again"):
        HuggingFaceFolder(tmp_path).check(ModelConfig(**shape_from_hf(tmp_path)))
