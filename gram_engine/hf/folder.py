"""The weights of a Hugging Face folder: safetensors, in one file or in shards with an index."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gram_engine.config.schema import ModelConfig
from gram_engine.errors import CheckpointError
from gram_engine.files import read_json
from gram_engine.hf.mapping import INDEX, OUTPUT, SCORE, SINGLE, hf_shapes
from gram_engine.hf.safetensors_file import Entry, SafetensorsReader


class HuggingFaceFolder:
    """Reads tensors of a folder by name; only the headers of the files are kept in memory.

    Raises:
        CheckpointError: the folder has no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._readers: dict[str, SafetensorsReader] = {}
        index = self.folder / INDEX
        if index.is_file():
            self.files = self._read_index(index)
        elif (self.folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._reader(SINGLE).entries, SINGLE)
        else:
            raise CheckpointError(f"{folder}: neither {INDEX} nor {SINGLE} is here. {_remedy(self.folder)}")

    def check(self, model: ModelConfig, other_head: str | None = None) -> torch.dtype:
        """Compare names and shapes with those that `model` needs, before any weight is read.

        Args:
            other_head: name of the tensor [1, hidden] that replaces the output layer, if there is one.

        Returns:
            The dtype of the weights.

        Raises:
            CheckpointError: names the tensors that are missing or unknown, or the first one of another shape.
        """
        wanted = hf_shapes(model)
        if other_head is None and SCORE.engine in self.files:
            raise CheckpointError(
                f"{self.folder}: a ...ForSequenceClassification, which has {SCORE.engine} instead of an output layer. Start "
                "from it with --load-hf and --objective bradley-terry (without --sft-loss-weight)."
            )
        if other_head:
            wanted.pop(OUTPUT.hf[0], None)
            wanted[other_head] = (1, model.hidden_size)
        # Old conversions store the rotary frequencies; with tied embeddings some folders repeat the output layer.
        extra = {
            name
            for name in self.files.keys() - wanted.keys()
            if not name.endswith("rotary_emb.inv_freq") and name not in OUTPUT.hf
        }
        if missing := wanted.keys() - self.files.keys():
            raise CheckpointError(f"{self.folder}: missing: {_some(missing)}. Download the folder again.")
        if extra:
            raise CheckpointError(f"{self.folder}: the engine does not know {_some(extra)}. It reads LLaMA and Qwen3.")
        for name, shape in wanted.items():
            if name == other_head and self.entry(name).shape[0] != 1:
                raise CheckpointError(f"{self.folder}: {self.entry(name).shape[0]} labels; one is needed.")
            if self.entry(name).shape != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {self.entry(name).shape}; config.json asks for {shape}. Use the "
                    "config.json that belongs to these weights."
                )
        return self.entry(next(iter(wanted))).dtype

    def entry(self, name: str) -> Entry:
        """Dtype, shape and offset of a tensor."""
        reader = self._reader(self.files[name])
        if name not in reader.entries:
            raise CheckpointError(f"{reader.path}: {name} is not here, but {INDEX} says so. Download the folder again.")
        return reader.entries[name]

    def read(self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """A tensor in its stored dtype, or the half-open ranges `rows` and `columns` of it."""
        return self._reader(self.files[name]).read(name, rows, columns)

    def _read_index(self, index: Path) -> dict[str, str]:
        """Tensor -> name of a file in the folder, which may be a symbolic link, as in the hub's cache."""
        files = read_json(index, CheckpointError, "Download it again.").get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise CheckpointError(f"{index}: not an index of safetensors files: no weight_map of names. Download it again.")
        for name in files.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {name!r:.200} is not a safetensors file in the folder.")
        return files

    def _reader(self, file: str) -> SafetensorsReader:
        if file not in self._readers:
            self._readers[file] = SafetensorsReader(self.folder / file)
        return self._readers[file]


def _remedy(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            "Its weights are pickles, which can run code when they are opened; the engine does not. If you trust the folder, "
            "convert it: CLASS.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), CLASS being transformers' class that "
            "config.json names as 'architectures'."
        )
    return "The weights must be safetensors."


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    rest = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return ", ".join(first) + rest
