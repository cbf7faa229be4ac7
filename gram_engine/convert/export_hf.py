"""Checkpoint -> Hugging Face folder: tensor by tensor, without a process group, whatever layout it was saved at."""

from __future__ import annotations

import json
import math
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
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gram_engine.config import Config, fail
from gram_engine.convert.mapping import INDEX, SINGLE, rules
from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError, GramError
from gram_engine.fileio import write_atomically
from gram_engine.model.presets import hf_config

GRAM_CONFIG = "gram_config.json"
MAX_SHARD_BYTES = 1024**3
"""Also what the export needs in memory beside one tensor: a shard is written when it is full."""
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
    # megatron-core tells of every optional package that it misses.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
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
    from gram_engine.training.checkpoint import run_config_of  # brings megatron-core, which `--help` does not need

    path, folder = _checkpoint_path(Path(checkpoint)), Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists. Remove it, or give another --save.")
    config = run_config_of(path)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        stored = _write_weights(path, temporary, config, DTYPES.get(dtype))
        _write_companions(path, temporary, config, str(stored).removeprefix("torch."))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _checkpoint_path(folder: Path) -> Path:
    from gram_engine.training.checkpoint import DATA_MANIFEST, RUN_CONFIG, TEMPLATE, TOKENIZER, latest_checkpoint

    path = latest_checkpoint(folder)
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint here. Give the --save folder of a run.")
    absent = [name for name in (RUN_CONFIG, DATA_MANIFEST, TEMPLATE, TOKENIZER) if not (path / name).exists()]
    if absent:
        raise CheckpointError(f"{path}: {', '.join(absent)} missing. Restore it from another checkpoint of the same run.")
    return path


class TorchDistCheckpoint:
    """Tensors of a torch_dist checkpoint by key and layer, put together from the shards of whatever layout saved them."""

    def __init__(self, path: Path):
        self.path = path
        self._reader = dcp.FileSystemReader(path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._described = metadata.state_dict_metadata

    def tensor(self, key: str, layer: int | None) -> Tensor:
        """One whole tensor; of a key that stacks the layers, that of one layer.

        Raises:
            CheckpointError: it is missing, a part of it is, or a file cannot be read.
        """
        described = self._described.get(key)
        if described is None or (layer is not None and layer >= described.size[0]):
            raise CheckpointError(f"{self.path}: tensor {key} {'' if layer is None else f'of layer {layer} '}is missing.")
        offsets, sizes = [0] * len(described.size), list(described.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, described, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise CheckpointError(f"{self.path}: parts of tensor {key} are missing. Export another checkpoint.")
        target = torch.empty(sizes, dtype=described.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _ReadInto(target)).wait()
        except (OSError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{self.path}: tensor {key} cannot be read: {error}") from error
        return target if layer is None else target[0]


class _ReadInto(dcp.DefaultLoadPlanner):
    """Tells the reader where the parts of one tensor go."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _hf_tensors(path: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of the whole model; one engine tensor of one layer is in memory at a time."""
    checkpoint = TorchDistCheckpoint(path)
    for rule, layer in rules(config.model):
        yield from zip(rule.hf_names(layer), rule.split(checkpoint.tensor(rule.engine, layer), config.model))


def _write_weights(path: Path, folder: Path, config: Config, dtype: torch.dtype | None) -> torch.dtype:
    """Sharded safetensors and their index; returns the dtype written."""
    shard: dict[str, Tensor] = {}
    shard_of: dict[str, int] = {}
    number, total = 1, 0
    for name, tensor in _hf_tensors(path, config):
        tensor = tensor.to(dtype or tensor.dtype)
        if shard and sum(part.nbytes for part in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            _save_shard(shard, folder / _part(number))
            shard, number = {}, number + 1
        shard[name], shard_of[name] = tensor, number
        total += tensor.nbytes
    _save_shard(shard, folder / _part(number))
    if number == 1:
        (folder / _part(1)).rename(folder / SINGLE)
        return tensor.dtype
    final = {part: f"model-{part:05d}-of-{number:05d}.safetensors" for part in range(1, number + 1)}
    for part, name in final.items():
        (folder / _part(part)).rename(folder / name)
    weight_map = {name: final[part] for name, part in sorted(shard_of.items())}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return tensor.dtype


def _save_shard(shard: dict[str, Tensor], path: Path) -> None:
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _part(number: int) -> str:
    return f"part-{number:05d}.safetensors"


def _write_companions(path: Path, folder: Path, config: Config, dtype: str) -> None:
    """Tokenizer, config.json, generation_config.json, gram_config.json and the model card."""
    from gram_engine.training.checkpoint import DATA_MANIFEST, TEMPLATE, TOKENIZER

    manifest = json.loads((path / DATA_MANIFEST).read_text(encoding="utf-8"))
    shutil.copytree(path / TOKENIZER, folder, dirs_exist_ok=True)
    tokenizer = Tokenizer.load("HuggingFaceTokenizer", folder)
    template = JudgeTemplate.load(path / TEMPLATE)
    labels = list(label_ids(tokenizer, template))
    if manifest.get("label_ids") not in (None, labels):
        raise CheckpointError(
            f"{path}: trained with the label ids {manifest['label_ids']}, but its tokenizer gives {labels}. "
            "The tokenizer folder of the checkpoint was changed: restore it."
        )
    _write_json(folder / "config.json", hf_config(config.model, dtype, tokenizer.bos_id, tokenizer.eos_id))
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    gram = {
        "template": template.to_dict(),
        "template_sha256": template.sha256,
        "labels": [template.label_a, template.label_b],
        "label_ids": labels,
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
