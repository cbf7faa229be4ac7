"""Hugging Face folder -> checkpoint of the engine, tensor by tensor, without a process group.

A run can also start from the Hugging Face folder itself (--load-hf, hf/load_weights.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Iterator, Optional

import torch
from torch import Tensor

from gram_engine.checkpoint.folder import iteration_folder, publish, write_metadata_files
from gram_engine.checkpoint.integrity import seal
from gram_engine.checkpoint.torch_dist import Key, TorchDistCheckpoint, describe, write_file, write_metadata
from gram_engine.config.schema import Config
from gram_engine.convert.jobs import Job, check_room, in_files, run_jobs, same_bits
from gram_engine.data.manifest import Manifest, described
from gram_engine.data.samples import label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.files import write_atomically
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.hf.mapping import rules
from gram_engine.model.shapes import resolve_shape

LINEAR = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


def import_checkpoint(
    folder: str | Path,
    save: str | Path,
    dtype: Optional[str] = None,
    *,
    template: str = "gram-code",
    processes: int = 1,
    verify: bool = False,
) -> Path:
    """Write a checkpoint of step 0, without optimizer state, to `save`; it can be used with --pretrained-checkpoint.

    Args:
        dtype: torch's name for the dtype of the written weights; None: that of the folder.
        template: judge prompt to record in the checkpoint.
        verify: read everything back and compare it, bit for bit, with the folder.

    Returns:
        The folder of the checkpoint, `save`/iter_0000000.

    Raises:
        CheckpointError: weights are missing, truncated or of another shape, or a written tensor differs.
        ConfigError: the architecture is not supported, `save` exists, or the disk has too little space.
    """
    save = Path(save)
    if save.exists() and any(entry.suffix != ".tmp" for entry in save.iterdir()):
        raise ConfigError(f"{save} exists. Remove it, or give another --save.")
    config = Config()
    config.model.load_hf, config.data.template = str(folder), template
    resolve_shape(config)
    tokenizer = Tokenizer.load(config.data.tokenizer_type, config.data.tokenizer_model)
    manifest = _manifest(config, tokenizer)
    stored = HuggingFaceFolder(folder).check(config.model)
    final = iteration_folder(save, 0)
    temporary = final.with_suffix(".tmp")
    dtype = getattr(torch, dtype) if dtype else stored
    files = in_files(rules(config.model), config.model, dtype)
    jobs = [Job(number, temporary, Path(folder), "", config.model, tuple(keys), dtype) for number, keys in enumerate(files)]
    check_room(save, jobs)
    shutil.rmtree(save, ignore_errors=True)  # left by an interrupted conversion
    temporary.mkdir(parents=True)
    try:
        places = run_jobs(_write, jobs, processes, "write")
        write_metadata_files(temporary, config, manifest, tokenizer)
        _complete(temporary, config, dtype, {place: where for of_file in places for place, where in of_file.items()})
        if verify:
            run_jobs(_verify, jobs, processes, "verify")
        seal(temporary, {}, processes)
        publish(temporary, final)
    except BaseException:
        shutil.rmtree(save, ignore_errors=True)
        raise
    return final


def _manifest(config: Config, tokenizer: Tokenizer) -> Manifest:
    template = JudgeTemplate.load(config.data.template)
    return Manifest(described(template), list(label_ids(tokenizer, template)))


def _tensors(job: Job) -> Iterator[tuple[Key, Tensor]]:
    """(key, tensor) of a job, generated one at a time."""
    source = HuggingFaceFolder(job.folder)
    for rule, layer in job.rules():
        parts = [source.read(name).to(job.dtype) for name in rule.hf_names(layer)]
        yield (rule.engine, layer), rule.join(parts, job.model)


def _write(job: Job) -> dict:
    return write_file(job.checkpoint, job.number, _tensors(job))


def _verify(job: Job) -> None:
    written = TorchDistCheckpoint(job.checkpoint)
    for (key, layer), tensor in _tensors(job):
        if not same_bits(written.tensor(key, layer), tensor):
            raise CheckpointError(f"{job.checkpoint}: {key} differs from the folder after it was written. Check the disk.")


def _complete(path: Path, config: Config, dtype: torch.dtype, places: dict) -> None:
    """Write megatron-core's common.pt, metadata.json (the format) and .metadata."""
    layers = config.model.num_layers
    described = {}
    for rule, layer in rules(config.model):
        shapes = rule.hf_shapes(config.model)
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        described[rule.engine] = describe(shape, dtype, None if layer is None else layers)
    torch.save({}, path / "common.pt")
    with write_atomically(path / "metadata.json") as handle:
        json.dump(FORMAT, handle)
    objects = [f"decoder.layers.{name}._extra_state/shard_{layer}_{layers}" for layer in range(layers) for name in LINEAR]
    write_metadata(path, places, described, objects)
