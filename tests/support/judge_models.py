"""Folders of small random models of many architectures, written by transformers, with a tokenizer that has a chat template."""

from __future__ import annotations

from pathlib import Path

import torch

COMMON = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=3,
)
WINDOW = 200
"""Sliding window: shorter than some of the texts that the tests score."""

KINDS = {
    "llama": ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=WINDOW)),
    "gemma2": ("Gemma2", dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW, attn_logit_softcapping=5.0)),
    "gemma3": ("Gemma3", dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW, final_logit_softcapping=3.0)),
    "phi3": ("Phi3", dict(partial_rotary_factor=0.5)),
    "gpt_neox": ("GPTNeoX", dict(rotary_pct=0.25)),
    "gpt2": ("GPT2", dict(scale_attn_by_inverse_layer_idx=True)),
    "granite": ("Granite", dict(attention_multiplier=0.1, logits_scaling=4.0, embedding_multiplier=3.0)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("GptOss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=WINDOW)),
    "mamba": ("Mamba", dict(state_size=4)),
    "bert": ("Bert", {}),
    "falcon_h1": ("FalconH1", dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, head_dim=16)),
}


def make_model(kind: str, head: str, **changes):
    """A random model: `head` is "ForCausalLM" or "ForSequenceClassification"."""
    import transformers

    name, settings = KINDS[kind]
    text = "Text" if name == "Gemma3" else ""
    model_class = getattr(transformers, name + {"GPT2ForCausalLM": "LMHeadModel"}.get(name + head, _inner(name, head)))
    config_class = getattr(transformers, f"{name}{text}Config")
    torch.manual_seed(0)
    model = model_class(config_class(**{**COMMON, **settings, **changes}))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5) if "Gemma" in name else torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if parameter_name.endswith("bias") or "sinks" in parameter_name:
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return model.eval()


def _inner(name: str, head: str) -> str:
    return "Text" + head if name == "Gemma3" and head == "ForSequenceClassification" else head


def write_model(folder: Path, kind: str, head: str, chat_folder: Path, **changes) -> Path:
    """The model and the tokenizer of `chat_folder` in a new folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    make_model(kind, head, **{"vocab_size": len(tokenizer), **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
