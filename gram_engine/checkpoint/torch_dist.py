"""Reads and writes tensors of a torch_dist checkpoint one at a time, without megatron-core and without a process group."""

from __future__ import annotations

import io
import math
import os
import pickle
from pathlib import Path
from typing import Iterable

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from gram_engine.checkpoint.safe_pickle import read_metadata, shard_path
from gram_engine.errors import CheckpointError
from gram_engine.files import write_atomically

UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)
Key = tuple[str, int | None]
"""Name of a tensor in the checkpoint, and the layer number if that tensor stacks all layers."""


class TorchDistCheckpoint:
    """Tensors of a checkpoint by key and layer, assembled from the shards of whatever layout saved them."""

    def __init__(self, path: Path):
        self.path = path
        self._metadata = read_metadata(path)

    def shape_and_dtype(self, key: str, layer: int | None) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor; if the key stacks the layers, of one layer's.

        Raises:
            CheckpointError: the tensor is missing.
        """
        described = self._metadata.state_dict_metadata.get(key)
        if described is None or (layer is not None and layer >= described.size[0]):
            raise CheckpointError(f"{self.path}: tensor {key} {'' if layer is None else f'of layer {layer} '}is missing.")
        size = described.size if layer is None else described.size[1:]
        return tuple(size), described.properties.dtype

    def tensor(self, key: str, layer: int | None) -> Tensor:
        """One whole tensor; if the key stacks the layers, that of one layer.

        Raises:
            CheckpointError: the tensor or a part of it is missing, or a file cannot be read.
        """
        shape, dtype = self.shape_and_dtype(key, layer)
        chunks = [
            chunk
            for chunk in self._metadata.state_dict_metadata[key].chunks
            if layer is None or chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]
        ]
        whole, filled = None, 0
        for chunk in chunks:
            part, offsets = self._read(key, chunk), list(chunk.offsets)
            if layer is not None:
                part, offsets = part[layer - offsets[0]], offsets[1:]
            filled += part.numel()
            if tuple(part.shape) == shape:
                return part  # saved whole, as by one process: no copy
            if whole is None:
                whole = torch.empty(shape, dtype=dtype)
            whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape))] = part
        if filled != math.prod(shape):
            raise CheckpointError(f"{self.path}: parts of tensor {key} are missing. Export another checkpoint.")
        return whole

    def _read(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        stored = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if stored is None:
            raise CheckpointError(f"{self.path}: its .metadata does not say where {key} lies. Use another checkpoint.")
        path = shard_path(self.path, stored)
        try:
            with open(path, "rb") as handle:
                view = _create_file_view(handle, stored.offset, stored.length)
                part = torch.load(view, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise CheckpointError(f"{path}: tensor {key} cannot be read: {error}") from error
        if part.shape != chunk.sizes:
            raise CheckpointError(f"{path}: tensor {key} has a part of shape {tuple(part.shape)}, not {tuple(chunk.sizes)}.")
        return part


def write_file(path: Path, number: int, tensors: Iterable[tuple[Key, Tensor]]) -> dict[MetadataIndex, _StorageInfo]:
    """Write one file of a checkpoint, a tensor in memory at a time if `tensors` is a generator.

    Args:
        path: the checkpoint's folder.
        number: number of this file among the files of the checkpoint.
        tensors: (key, layer) and the tensor, without the axis that stacks the layers.

    Returns:
        the position of each tensor in the file, for `write_metadata`.
    """
    name, places = f"__{number}_0.distcp", {}
    with open(path / name, "wb") as handle:
        for (key, layer), tensor in tensors:
            stacked = tensor if layer is None else tensor[None]
            offset = [0] * stacked.dim()
            offset[:1] = [layer or 0]
            start = handle.tell()
            torch.save(stacked.clone() if stacked.untyped_storage().nbytes() != stacked.nbytes else stacked, handle)
            places[MetadataIndex(key, torch.Size(offset))] = _StorageInfo(name, start, handle.tell() - start)
        handle.flush()
        os.fsync(handle.fileno())
    return places


def write_metadata(
    path: Path,
    places: dict[MetadataIndex, _StorageInfo],
    tensors: dict[str, TensorStorageMetadata],
    objects: Iterable[str],
) -> None:
    """Write the .metadata of a checkpoint whose tensors are written, and its empty objects.

    Args:
        places: what `write_file` returned for all files.
        tensors: what `describe` returns for each key.
        objects: keys of empty objects: each linear layer of megatron-core saves one for Transformer Engine's state.
    """
    name, empty = "__objects_0.distcp", io.BytesIO()
    torch.save([None], empty)
    described: dict = dict(tensors)
    with open(path / name, "wb") as handle:
        for key in objects:
            described[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(name, handle.tell(), len(empty.getbuffer()))
            handle.write(empty.getbuffer())
    metadata = Metadata(state_dict_metadata=described, storage_data=places, version=CURRENT_DCP_VERSION)
    with write_atomically(path / ".metadata", "wb") as handle:
        pickle.dump(metadata, handle)


def describe(shape: tuple[int, ...], dtype: torch.dtype, layers: int | None) -> TensorStorageMetadata:
    """Metadata of a tensor [*shape], or of one [layers, *shape] that is stored in a chunk for each layer."""
    if layers is None:
        size, chunks = shape, [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]
    else:
        size = (layers, *shape)
        offsets = [torch.Size([layer] + [0] * len(shape)) for layer in range(layers)]
        chunks = [ChunkStorageMetadata(offset, torch.Size((1, *shape))) for offset in offsets]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), chunks)
