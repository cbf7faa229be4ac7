"""Refuses checkpoints that would run code when they are loaded, before anything in them is unpickled.

A checkpoint holds pickles, and a pickle can call any function that it names:

    .metadata                     pickle.load, by torch's FileSystemReader
    common.pt                     torch.load, by megatron-core (weights only, unless an environment variable says otherwise)
    objects in the shards         torch.load with weights_only=False, by torch's load planner
    byte tensors of such objects  pickle.loads, by Transformer Engine 2.11 (its `_extra_state`)

Tensors themselves are read with weights_only=True. The check unpickles everything with a class that does nothing in place of
each function or class that is named, and refuses every name that is not in ALLOWED (what checkpoints of the engine contain).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import IO, Iterator

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from gram_engine.checkpoint.integrity import METADATA, DamagedCheckpoint
from gram_engine.errors import CheckpointError

ALLOWED = {
    "collections": "OrderedDict",
    "torch": "Size",
    "torch._utils": "_rebuild_tensor_v2",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
        "TensorStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    "torch.distributed.checkpoint.storage": "WriteResult",
    "transformer_engine.common.recipe": (
        "DelayedScaling Float8BlockScaling Float8CurrentScaling Format MMParams MXFP8BlockScaling QParams _FormatHelper"
    ),
}
STORAGES = {f"{kind}Storage" for kind in "Untyped Byte Char Short Int Long Half BFloat16 Float Double Bool".split()}
NAMES = {(module, name) for module, names in ALLOWED.items() for name in names.split()}


class _Forbidden(Exception):
    """A pickle names something that is not in checkpoints of the engine."""


def check_no_code(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Refuse a checkpoint whose files would run code when they are loaded.

    Args:
        part, parts: of several processes, each checks its share of the objects in the shards.

    Raises:
        CheckpointError: a file would run code; the text names the file and what it would call.
        DamagedCheckpoint: a file cannot be read.
    """
    metadata = read_metadata(checkpoint)
    common = checkpoint / "common.pt"
    _check(common, lambda: _check_torch_file(common.read_bytes()))
    objects = _check(checkpoint / METADATA, lambda: _objects(metadata))
    for stored in objects[part::parts]:
        path = shard_path(checkpoint, stored)
        _check(path, lambda path=path, stored=stored: _check_object(_slice(path, stored.offset, stored.length)))


def _objects(metadata: Metadata) -> list:
    """Positions (_StorageInfo) in the shards of all objects that are not tensors."""
    keys = sorted(key for key, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata))
    found = [metadata.storage_data[MetadataIndex(key)] for key in keys]
    if any(getattr(stored, "transform_descriptors", None) for stored in found):
        raise ValueError("it names objects that are stored compressed, which the engine does not do")
    return found


def read_metadata(checkpoint: Path) -> Metadata:
    """Read .metadata: which tensors a checkpoint holds, and their positions in the files.

    Raises:
        CheckpointError, DamagedCheckpoint: as for `check_no_code`.
    """
    content, path = b"", checkpoint / METADATA

    def read():
        nonlocal content
        content = path.read_bytes()
        _check_pickle(io.BytesIO(content))
        metadata = pickle.loads(content)
        if not isinstance(metadata, Metadata):
            raise ValueError("it holds no Metadata")
        return metadata

    return _check(path, read)


def shard_path(checkpoint: Path, stored) -> Path:
    """Path of the file that a _StorageInfo names.

    Raises:
        CheckpointError: it is outside the checkpoint.
    """
    path = checkpoint / stored.relative_path
    if path.parent != checkpoint:
        raise CheckpointError(f"{checkpoint / METADATA}: {stored.relative_path} lies outside the checkpoint. Use another one.")
    return path


def _check(path: Path, act):
    """Call act(); whatever a damaged pickle raises becomes a DamagedCheckpoint that names the file."""
    try:
        return act()
    except _Forbidden as error:
        raise CheckpointError(
            f"{path}: would run code when it is loaded: it calls {error}. No checkpoint of the engine does: do not use it."
        ) from None
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({type(error).__name__}: {error}).") from error


class _Names(pickle.Unpickler):
    """Unpickles without calling anything: everything that the pickle names is replaced by a class that does nothing."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)

        class StandIn:  # a new one for each pickle, which may set attributes of the class
            def __new__(cls, *_, **__):
                return super().__new__(cls)

            def __setitem__(self, *_):
                pass

            def __setstate__(self, _):
                pass

        self.stand_in = StandIn

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _check_nested
        named_dtype_or_storage = module == "torch" and (
            isinstance(getattr(torch, name, None), torch.dtype) or name in STORAGES
        )
        if (module, name) in NAMES or named_dtype_or_storage:
            return self.stand_in
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, _):
        return None


def _check_pickle(file: IO[bytes]) -> None:
    _Names(file).load()


def _check_nested(content) -> None:
    """A tensor in a plain pickle is stored as the content of a torch.save file."""
    if not isinstance(content, bytes):
        raise _Forbidden("torch.storage._load_from_bytes with computed bytes")
    _check_torch_file(content)


def _check_torch_file(content: bytes) -> None:
    """Check the content of a torch.save file, read by torch's own reader so that torch.load will see the same pickle."""
    if not content.startswith(b"PK\x03\x04"):
        raise ValueError("not a file of torch.save")
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    if reader.has_record("constants.pkl"):
        raise _Forbidden("TorchScript")
    _check_pickle(io.BytesIO(reader.get_record("data.pkl")))


def _check_object(content: bytes) -> None:
    _check_torch_file(content)
    for tensor in _tensors(torch.load(io.BytesIO(content), weights_only=True)):
        if tensor.dtype == torch.uint8 and tensor.numel():
            _check_pickle(io.BytesIO(tensor.numpy().tobytes()))


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)


def _slice(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(offset)
        content = handle.read(length)
    if len(content) != length:
        raise EOFError("it is cut off")
    return content
