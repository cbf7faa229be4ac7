"""Model shapes: presets, and conversion from and to a Hugging Face config.json. Field names are ModelConfig's."""

from __future__ import annotations

from pathlib import Path

from gram_engine.config.schema import Config, ModelConfig
from gram_engine.errors import ConfigError
from gram_engine.files import read_json


def _shape(layers, hidden, ffn, heads, groups, *, base=500000.0, tied=False, **more) -> dict:
    return dict(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        rotary_base=base,
        untie_embeddings_and_output_weights=not tied,
        **more,
    )


def _llama_3(*shape, scaling=None, positions=131072, **more) -> dict:
    more.update(vocab_size=128256, rope_scaling_factor=scaling, max_position_embeddings=positions)
    return _shape(*shape, **more)


def _qwen_3(*shape, **more) -> dict:
    more.update(vocab_size=151936, base=1e6, kv_channels=128, qk_layernorm=True, norm_epsilon=1e-6)
    return _shape(*shape, max_position_embeddings=40960, **more)


# tiny and small are trained from scratch: vocabulary size and sequence length come from the data.
PRESETS: dict[str, dict] = {
    "tiny": _shape(2, 64, 192, 4, 2, base=10000.0),
    "tiny-tied": _shape(2, 64, 192, 4, 2, base=10000.0, tied=True),
    "small": _shape(4, 256, 704, 4, 2, base=10000.0),
    "llama-2-7b": _shape(32, 4096, 11008, 32, 32, base=10000.0, max_position_embeddings=4096, vocab_size=32000),
    "llama-3-8b": _llama_3(32, 4096, 14336, 32, 8, positions=8192),
    "llama-3.1-8b": _llama_3(32, 4096, 14336, 32, 8, scaling=8.0),
    "llama-3.1-70b": _llama_3(80, 8192, 28672, 64, 8, scaling=8.0),
    "llama-3.2-1b": _llama_3(16, 2048, 8192, 32, 8, scaling=32.0, tied=True),
    "llama-3.2-3b": _llama_3(28, 3072, 8192, 24, 8, scaling=32.0, tied=True),
    "qwen3-0.6b": _qwen_3(28, 1024, 3072, 16, 8, tied=True),
    "qwen3-1.7b": _qwen_3(28, 2048, 6144, 16, 8, tied=True),
    "qwen3-4b": _qwen_3(36, 2560, 9728, 32, 8, tied=True),
    "qwen3-8b": _qwen_3(36, 4096, 12288, 32, 8),
    "qwen3-14b": _qwen_3(40, 5120, 17408, 40, 8),
}

# The other parameters of LLaMA 3.1's rotary scaling (model/rotary.py); megatron-core has the same constants.
ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def resolve_shape(config: Config) -> None:
    """Fill the model's unset fields from --load-hf or --model, then from defaults; explicit flags override a preset.

    Raises:
        ConfigError: a required field is still unset, or a flag contradicts the Hugging Face folder.
    """
    model = config.model
    if model.load_hf:
        for name, value in shape_from_hf(model.load_hf).items():
            given = getattr(model, name)
            if given is not None and given != value:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {given} contradicts {model.load_hf}/config.json ({value}). Leave the flag out.")
            setattr(model, name, value)
        if config.data.tokenizer_model is None:
            config.data.tokenizer_model = model.load_hf
    elif model.model is not None:
        if model.model not in PRESETS:
            raise ConfigError(f"--model {model.model}: unknown preset. Choose one of: {', '.join(sorted(PRESETS))}.")
        for name, value in PRESETS[model.model].items():
            if getattr(model, name) is None:
                setattr(model, name, value)
    required = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    missing = [f"--{name.replace('_', '-')}" for name in required if getattr(model, name) is None]
    if missing:
        raise ConfigError(f"The model's shape is open: give --model, --load-hf, or {' '.join(missing)}.")
    fallbacks = {
        "num_query_groups": model.num_attention_heads,
        "kv_channels": model.hidden_size // model.num_attention_heads,
        "max_position_embeddings": config.data.seq_length,
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": True,
        "qk_layernorm": False,
        "lora_alpha": None if model.lora_rank is None else 2.0 * model.lora_rank,
    }
    for name, value in fallbacks.items():
        if getattr(model, name) is None:
            setattr(model, name, value)
    model.lora_modules = tuple(name for name in ModelConfig.lora_modules if name in model.lora_modules)


def shape_from_hf(folder: str | Path) -> dict:
    """ModelConfig fields from `folder`/config.json.

    Raises:
        ConfigError: there is no such folder, its architecture is neither LLaMA nor Qwen3, or it needs a feature that the engine
            does not have.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. --load-hf needs a Hugging Face folder with config.json and safetensors.")
    hf = read_json(path, ConfigError, "Download it again.")
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ConfigError(f"{path}: model_type is {_shown(kind)}; the engine reads 'llama' and 'qwen3'.")
    if missing := [key for key in _REQUIRED if hf.get(key) is None]:
        raise ConfigError(f"{path}: {', '.join(missing)} missing. Use the config.json that belongs to the weights.")
    for key, wanted in _SUPPORTED.items():
        if hf.get(key, wanted) != wanted:
            raise ConfigError(f"{path}: {key} is {_shown(hf[key])}; the engine has only {wanted!r}.")
    base, factor = _rope(hf, path)
    heads, hidden = _size(hf, "num_attention_heads", path), _size(hf, "hidden_size", path)
    groups = _size(hf, "num_key_value_heads", path, heads)
    dim = _size(hf, "head_dim", path, hidden // heads)
    layers = _size(hf, "num_hidden_layers", path)
    if heads % groups or dim % 2 or layers > MOST_LAYERS:
        raise ConfigError(f"{path}: {layers} layers with {heads} heads of {dim} in {groups} groups: no such model exists.")
    return dict(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=_size(hf, "intermediate_size", path),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=dim,
        vocab_size=_size(hf, "vocab_size", path),
        rotary_base=base,
        rope_scaling_factor=factor,
        # LlamaConfig's defaults.
        norm_epsilon=_number(hf, "rms_norm_eps", path, 1e-6),
        max_position_embeddings=_size(hf, "max_position_embeddings", path, 2048),
        untie_embeddings_and_output_weights=not hf.get("tie_word_embeddings", False),
        qk_layernorm=kind == "qwen3",
    )


MOST_LAYERS = 10_000
"""Limit for a damaged config.json: the names of all tensors are listed before any file is opened."""


def _size(content: dict, name: str, path: Path, default: int | None = None) -> int:
    """A positive integer; the default if the field is absent or null."""
    value = content.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ConfigError(f"{path}: {name} is {_shown(value)}, not a positive whole number. Download it again.")
    return value


def _number(content: dict, name: str, path: Path, default: float | None = None) -> float:
    """A positive number; the default if the field is absent or null."""
    value = content.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ConfigError(f"{path}: {name} is {_shown(value)}, not a positive number. Download it again.")
    return float(value)


def _shown(value: object) -> str:
    return "null" if value is None else f"{value!r:.40}" if isinstance(value, (str, int, float)) else type(value).__name__


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
_SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}


def _rope(hf: dict, path: Path) -> tuple[float, float | None]:
    """(base, LLaMA-3.1 scaling factor or None); transformers >= 5 keeps both in `rope_parameters`."""
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{path}: rope_parameters is of type {type(parameters).__name__}, not an object. Download it again.")
    base = _number(parameters, "rope_theta", path, _number(hf, "rope_theta", path, 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{path}: partial_rotary_factor is not 1; the engine rotates whole heads.")
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ConfigError(f"{path}: rope_type {_shown(kind)}; the engine has 'default' and 'llama3'.")
    for key, wanted in ROPE_SCALING.items():
        if parameters.get(key) != wanted:
            raise ConfigError(f"{path}: {key} is {_shown(parameters.get(key))}; megatron-core's scaling has {wanted} built in.")
    return base, _number(parameters, "factor", path)


def hf_config(model: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None) -> dict:
    """config.json of a resolved model (LlamaForCausalLM or Qwen3ForCausalLM); `dtype` is torch's name, such as "bfloat16"."""
    rope = {"rope_type": "default", "rope_theta": model.rotary_base}
    scaling = None
    if model.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **ROPE_SCALING}
        rope.update(scaling)
    return {
        "architectures": ["Qwen3ForCausalLM" if model.qk_layernorm else "LlamaForCausalLM"],
        "model_type": "qwen3" if model.qk_layernorm else "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_parameters": rope,
        # The same for transformers 4, which does not know `rope_parameters`.
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        "dtype": dtype,
    }
