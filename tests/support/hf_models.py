"""Small random LLaMA and Qwen3 folders, written by transformers."""

from __future__ import annotations

import torch

SCALINGS = {
    "plain": None,
    "llama3-8": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    "llama3-32": dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
}
KINDS = (*SCALINGS, "qwen3")


def write_hf_model(folder, vocab_size, tied, kind, dtype=torch.float32):
    """A random model of one of KINDS, saved by transformers itself; the heads together are wider than the hidden size."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if SCALINGS.get(kind):
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, **SCALINGS[kind]}
    make_config, make_model = (Qwen3Config, Qwen3ForCausalLM) if kind == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    config = make_config(
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
    model = make_model(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model.eval()
