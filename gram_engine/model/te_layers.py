"""What a run uses of Transformer Engine: its layers, FP8, and overlap of tensor-parallel communication with its GEMMs.

platform/stack.py knows which versions of Transformer Engine belong to which megatron-core.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import ContextManager

from gram_engine.config.schema import Config
from gram_engine.errors import ConfigError
from gram_engine.platform.device import Platform
from gram_engine.platform.stack import check_transformer_engine

INSTALL = "make gpu"

# FP8 recipe -> compute capability that it needs, and the GPUs that have it.
CAPABILITIES = {
    "delayed": ((8, 9), "an L40S, H100 or newer GPU"),
    "tensorwise": ((8, 9), "an L40S, H100 or newer GPU"),
    "blockwise": ((9, 0), "an H100 or newer GPU"),
    "mxfp8": ((10, 0), "a B200 or newer GPU"),
}


def uses_transformer_engine(config: Config, platform: Platform) -> bool:
    """Whether the layers are Transformer Engine's.

    Raises:
        ConfigError: a flag needs Transformer Engine (--transformer-impl, --fp8-format or --tp-comm-overlap), but it is not
            installed or there is no GPU; or its version does not belong to the installed megatron-core.
    """
    choice, installed = config.model.transformer_impl, importlib.util.find_spec("transformer_engine") is not None
    usable = installed and platform.is_cuda
    requested_by = {
        "--transformer-impl transformer_engine": choice == "transformer_engine",
        "--fp8-format": config.training.fp8_format is not None,
        "--tp-comm-overlap": config.parallel.tp_comm_overlap,
    }
    flag = next((flag for flag, given in requested_by.items() if given), None)
    if flag and not usable:
        missing = "a GPU" if installed else f"the transformer-engine package ({INSTALL}) and a GPU"
        raise ConfigError(f"{flag} needs {missing}. Leave it out to train with local layers in BF16.")
    if choice == "local" or not usable:
        return False
    check_transformer_engine()
    return True


def check_gpu(config: Config, platform: Platform) -> None:
    """Refuse settings that this machine does not support, before any process group starts.

    Raises:
        ConfigError: as `uses_transformer_engine`; --recompute-modules needs Transformer Engine's layers; or the GPU does not
            support the FP8 recipe.
    """
    training = config.training
    recomputed = training.recompute_modules if training.recompute_granularity == "selective" else ()
    if not uses_transformer_engine(config, platform) and "layernorm" in recomputed:
        raise ConfigError("--recompute-modules layernorm needs Transformer Engine's layers: leave layernorm out.")
    if training.fp8_format is None:
        return
    needed, hardware = CAPABILITIES[training.fp8_recipe]
    found = platform.compute_capability()
    if found < needed:
        raise ConfigError(
            f"--fp8-recipe {training.fp8_recipe} needs {hardware} (compute capability {needed[0]}.{needed[1]}); this is "
            f"{platform.name()} ({found[0]}.{found[1]}). Leave --fp8-format out to train in BF16."
        )


def fp8_fields(config: Config) -> dict:
    """The FP8 fields of megatron-core's TransformerConfig; {} without FP8."""
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
    """Context manager that disables FP8: for computing, or with `building` for the creation of parameters."""
    if config.training.fp8_format is None:
        return contextlib.nullcontext()
    import transformer_engine.pytorch as te

    return te.fp8_model_init(enabled=False) if building else te.fp8_autocast(enabled=False)


def start_userbuffers(config: Config) -> None:
    """Allocate the communication buffers of --tp-comm-overlap.  Call it after the process groups are initialised.

    Their shape is [tokens of a pack / context-parallel size, hidden].
    """
    if not config.parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    fp8 = config.training.fp8_format is not None
    quantization_modes = [modes.FP8 if fp8 else modes.NONE]
    if fp8 and config.training.first_last_layers_bf16:
        quantization_modes.append(modes.NONE)
    tokens = config.pack_tokens // config.parallel.context_parallel_size
    base.initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=config.parallel.tensor_model_parallel_size,
        quantization_modes=quantization_modes,
        bootstrap_backend="nccl",
    )
