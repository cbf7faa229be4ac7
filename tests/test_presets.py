"""Presets against the published models' sizes, and Hugging Face configurations in both directions."""

import json

import pytest

from gram_engine.config.parse import parse
from gram_engine.errors import ConfigError
from gram_engine.hf.mapping import hf_shapes
from gram_engine.model.shapes import PRESETS, ROPE_SCALING, hf_config, resolve_shape, shape_from_hf

# Parameters of the published checkpoints.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
}


def resolved(preset):
    config = parse(["--model", preset, "--data", "x"])
    resolve_shape(config)
    config.model.vocab_size = config.model.vocab_size or 512
    return config.model


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_are_the_published_models(preset, tmp_path):
    """transformers, given the preset's config.json, makes the same tensors, and as many parameters as were published."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = resolved(preset)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, "bfloat16", 1, 2)))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {name: tuple(weight.shape) for name, weight in theirs.named_parameters()} == hf_shapes(model)
    assert sum(weight.numel() for weight in theirs.parameters()) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_config_json_reads_back_as_the_same_shape(preset, tmp_path):
    from transformers import AutoConfig

    model = resolved(preset)
    written = hf_config(model, "bfloat16", 1, 2)
    (tmp_path / "config.json").write_text(json.dumps(written))
    for name, value in shape_from_hf(tmp_path).items():
        assert value == getattr(model, name), name

    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters == written["rope_parameters"]
    # What transformers writes in turn reads as the same shape, and so does transformers 4's spelling.
    theirs.save_pretrained(tmp_path)
    assert shape_from_hf(tmp_path) == {name: getattr(model, name) for name in shape_from_hf(tmp_path)}
    del written["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert shape_from_hf(tmp_path)["rope_scaling_factor"] == model.rope_scaling_factor
    assert shape_from_hf(tmp_path)["rotary_base"] == model.rotary_base


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **ROPE_SCALING}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; the engine reads 'llama' and 'qwen3'"),
        ({"attention_bias": True}, "attention_bias is True; the engine has only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the engine has only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"num_hidden_layers": None}, "num_hidden_layers missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'; the engine has 'default' and 'llama3'"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 2.0}}, "high_freq_factor is 2.0; megatron-core's scaling has 4.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_the_engine_cannot_run_are_refused(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**hf_config(resolved("llama-3.1-8b"), "bfloat16", 1, 2), **change}))
    with pytest.raises(ConfigError, match=message):
        shape_from_hf(tmp_path)


def test_missing_and_broken_config_json(tmp_path):
    with pytest.raises(ConfigError, match="config.json: no such file. --load-hf needs"):
        shape_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not valid JSON"):
        shape_from_hf(tmp_path)
