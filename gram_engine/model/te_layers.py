"""What a run takes from Transformer Engine: its layers, FP8, and tensor-parallel communication behind its matrix products.

Which versions of it belong to which megatron-core: platform/stack.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import ContextManager

import torch

from gram_engine.config.schema import Config
from gram_engine.errors import ConfigError
from gram_engine.platform.device import Platform
from gram_engine.platform.stack import check_transformer_engine

INSTALL = "make gpu"

# Compute capability that FP8 recipes need, and the hardware that has it.
CAPABILITIES = {
    "delayed": ((8, 9), "an L40S, H100 or newer GPU"),
    "tensorwise": ((8, 9), "an L40S, H100 or newer GPU"),
    "blockwise": ((9, 0), "an H100 or newer GPU"),
    "mxfp8": ((10, 0), "a B200 or newer GPU"),
}


def uses_transformer_engine(config: Config, platform: Platform) -> bool:
    """Whether layers come from Transformer Engine.

    Raises:
        ConfigError: it was asked for, also by FP8 or --tp-comm-overlap, and is not installed, or there is no GPU; or its
            version does not belong to the installed megatron-core.
    """
    choice, installed = config.model.transformer_impl, importlib.util.find_spec("transformer_engine") is not None
    asked_by = {
        "--transformer-impl transformer_engine": choice == "transformer_engine",
        "--fp8-format": config.training.fp8_format is not None,
        "--tp-comm-overlap": config.parallel.tp_comm_overlap,
    }
    flag = next((flag for flag, given in asked_by.items() if given), None)
    if flag and not (installed and platform.is_cuda):
        lacks = "a GPU" if installed else f"the transformer-engine package ({INSTALL}) and a GPU"
        raise ConfigError(f"{flag} needs {lacks}. Leave it out to train with local layers in BF16.")
    if choice == "local" or not installed or not platform.is_cuda:
        return False
    check_transformer_engine()
    return True


def check_gpu(config: Config, platform: Platform) -> None:
    """Refuse what this machine cannot do, before any process group starts.

    Raises:
        ConfigError: Transformer Engine is missing or of another line, or the GPU is too old for the FP8 recipe.
    """
    training = config.training
    recomputed = training.recompute_modules if training.recompute_granularity == "selective" else ()
    if not uses_transformer_engine(config, platform) and "layernorm" in recomputed:
        raise ConfigError("--recompute-modules layernorm needs Transformer Engine's layers: leave layernorm out.")
    if training.fp8_format is None:
        return
    needed, hardware = CAPABILITIES[training.fp8_recipe]
    found = torch.cuda.get_device_capability(platform.device)
    if found < needed:
        raise ConfigError(
            f"--fp8-recipe {training.fp8_recipe} needs {hardware} (compute capability {needed[0]}.{needed[1]}); this is "
            f"{torch.cuda.get_device_name(platform.device)} ({found[0]}.{found[1]}). Leave --fp8-format out to train in BF16."
        )


def fp8_fields(config: Config) -> dict:
    """FP8 fields of megatron-core's TransformerConfig."""
    training = config.training
    if training.fp8_format is None:
        return {}
    fields = dict(
        fp8=training.fp8_format,
        fp8_recipe=training.fp8_recipe,
        fp8_param=training.fp8_param_gather,
        first_last_layers_bf16=training.first_last_layers_bf16,
    )
    if training.fp8_recipe == "delayed":
        fields.update(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    return fields


def without_fp8(config: Config, building: bool = False) -> ContextManager:
    """Computes (or, while building, makes parameters) in the model's own precision, inside an FP8 context."""
    if config.training.fp8_format is None:
        return contextlib.nullcontext()
    import transformer_engine.pytorch as te

    return te.fp8_model_init(enabled=False) if building else te.fp8_autocast(enabled=False)


def start_userbuffers(config: Config) -> None:
    """The buffers of --tp-comm-overlap: one for each process's share of a whole pack. After process groups are up."""
    if not config.parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    fp8 = config.training.fp8_format is not None
    used = [modes.FP8 if fp8 else modes.NONE]
    if fp8 and config.training.first_last_layers_bf16:
        used.append(modes.NONE)
    tokens = config.pack_tokens // config.parallel.context_parallel_size
    base.initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=config.parallel.tensor_model_parallel_size,
        quantization_modes=used,
        bootstrap_backend="nccl",
    )
