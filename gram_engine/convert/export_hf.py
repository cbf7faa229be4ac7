"""Checkpoint -> Hugging Face folder: tensor by tensor, without a process group, whatever layout it was saved at."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Iterator, Literal, Optional

import torch
import torch.distributed.checkpoint as dcp
import tyro
from safetensors.torch import save_file
from torch import Tensor

from gram_engine.config import Config, fail, load_yaml
from gram_engine.convert.mapping import hf_names, rules
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError, GramError
from gram_engine.fileio import write_atomically
from gram_engine.model.presets import hf_config

GRAM_CONFIG = "gram_config.json"
MAX_SHARD_BYTES = 4 * 1024**3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ConvertArguments:
    """Convert a checkpoint of the engine to a Hugging Face folder."""

    load: str
    """Folder of checkpoints (--save of a run), or one iter_... folder."""
    save: str
    """Hugging Face folder to write; must not exist."""
    source: Annotated[Literal["engine"], tyro.conf.arg(name="from")] = "engine"
    """Format to read."""
    to: Literal["hf"] = "hf"
    """Format to write."""
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None
    """Dtype of the exported weights; default: as the checkpoint holds them."""


def main(argv: list[str] | None = None) -> None:
    """Command line of tools/convert_checkpoint.py and `gram convert`."""
    arguments = tyro.cli(ConvertArguments, args=argv, prog="gram convert")
    try:
        print(f"wrote {export_hf(arguments.load, arguments.save, arguments.dtype)}")
    except GramError as error:
        fail(error)


def export_hf(checkpoint: str | Path, folder: str | Path, dtype: str | None = None) -> Path:
    """Write `folder` from the newest checkpoint in `checkpoint`; it appears under its name only when whole.

    Raises:
        CheckpointError: no checkpoint, or a tensor is missing.
        ConfigError: `folder` exists.
    """
    path, folder = _checkpoint_path(Path(checkpoint)), Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists. Remove it, or give another --save.")
    config = load_yaml(path / "run_config.yaml")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    stored = _write_weights(path, temporary, config, DTYPES.get(dtype))
    _write_companions(path, temporary, config, str(stored).removeprefix("torch."))
    os.replace(temporary, folder)
    return folder


def _checkpoint_path(folder: Path) -> Path:
    from gram_engine.training.checkpoint import latest_checkpoint  # brings megatron: not needed by `--help`

    path = latest_checkpoint(folder)
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint here. Give the --save folder of a run.")
    return path


class TorchDistCheckpoint:
    """Whole tensors of a torch_dist checkpoint by key, read one at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        self._cached: tuple[str, Tensor] | None = None

    def tensor(self, key: str) -> Tensor:
        """The tensor of one key, layers stacked first; the last one read is kept."""
        if self._cached is None or self._cached[0] != key:
            if key not in self.metadata:
                raise CheckpointError(f"{self.path}: tensor {key} is missing.")
            described = self.metadata[key]
            state = {key: torch.empty(described.size, dtype=described.properties.dtype)}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
                dcp.load(state, storage_reader=dcp.FileSystemReader(self.path), no_dist=True)
            self._cached = (key, state[key])
        return self._cached[1]


def _hf_tensors(path: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of the whole model; grouped by engine key, so that each is read once."""
    checkpoint, model = TorchDistCheckpoint(path), config.model
    ordered = sorted(rules(model), key=lambda entry: entry[0].engine)
    for rule, layer in ordered:
        tensor = checkpoint.tensor(rule.engine)
        yield from zip(hf_names(rule, layer), rule.split(tensor if layer is None else tensor[layer], model))


def _write_weights(path: Path, folder: Path, config: Config, dtype: torch.dtype | None) -> torch.dtype:
    """Sharded safetensors and their index; returns the dtype written."""
    shard: dict[str, Tensor] = {}
    shard_of: dict[str, int] = {}
    number, total = 1, 0
    for name, tensor in _hf_tensors(path, config):
        tensor = tensor.to(dtype or tensor.dtype).contiguous().clone()
        if shard and sum(part.nbytes for part in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            save_file(shard, folder / _part(number), metadata={"format": "pt"})
            shard, number = {}, number + 1
        shard[name], shard_of[name] = tensor, number
        total += tensor.nbytes
    save_file(shard, folder / _part(number), metadata={"format": "pt"})
    if number == 1:
        (folder / _part(1)).rename(folder / "model.safetensors")
        return tensor.dtype
    final = {part: f"model-{part:05d}-of-{number:05d}.safetensors" for part in range(1, number + 1)}
    for part, name in final.items():
        (folder / _part(part)).rename(folder / name)
    weight_map = {name: final[part] for name, part in sorted(shard_of.items())}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return tensor.dtype


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _write_companions(path: Path, folder: Path, config: Config, dtype: str) -> None:
    manifest = json.loads((path / "data_manifest.json").read_text(encoding="utf-8"))
    shutil.copytree(path / "tokenizer", folder, dirs_exist_ok=True)
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", folder)
    _write_json(folder / "config.json", hf_config(config.model, dtype, tokenizer.bos_id, tokenizer.eos_id))
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    template = JudgeTemplate.from_dict(
        {key: value for key, value in manifest["template"].items() if key != "sha256"}, "data_manifest.json"
    )
    from gram_engine.data.samples import label_ids

    gram = {
        "template": template.to_dict(),
        "template_sha256": template.sha256,
        "labels": [template.label_a, template.label_b],
        "label_ids": list(label_ids(tokenizer, template)),
        "seq_length": config.data.seq_length,
        "overlong": "truncate",
        "order_rule": "reward of y1 against y2 = mean of p(A | y1, y2) and p(B | y2, y1), softmax over the two labels",
    }
    _write_json(folder / GRAM_CONFIG, gram)
    with write_atomically(folder / "README.md") as handle:
        handle.write(_model_card(path, config))


def _model_card(path: Path, config: Config) -> str:
    return (
        "---\nlibrary_name: transformers\ntags: [reward-model, gram]\n---\n\n"
        "# Generative reward model\n\n"
        f"Trained with gram_engine, objective `{config.training.objective}`, checkpoint `{path.name}`. "
        "Score with `gram score IN.jsonl OUT.jsonl --model THIS_FOLDER`. "
        f"Template, label tokens and the order rule are in `{GRAM_CONFIG}`.\n\n"
        f"## Training configuration\n\n```yaml\n{config.to_yaml()}```\n"
    )


def _write_json(path: Path, content: dict) -> None:
    with write_atomically(path) as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
