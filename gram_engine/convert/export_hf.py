"""Checkpoint of any layout -> Hugging Face folder, tensor by tensor, without a process group."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Iterator, Optional

import torch
from torch import Tensor

from gram_engine.checkpoint.folder import DATA_MANIFEST, RUN_CONFIG, TEMPLATE, TOKENIZER, latest_checkpoint, run_config_of
from gram_engine.checkpoint.integrity import DamagedCheckpoint, verify
from gram_engine.checkpoint.torch_dist import TorchDistCheckpoint
from gram_engine.config.schema import Config, ModelConfig
from gram_engine.convert.jobs import Job, check_room, head_key, in_files, run_jobs, same_bits
from gram_engine.convert.metadata_files import label_ids_of, read_evaluation, write_hf_metadata_files
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.files import write_json
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.hf.gram_config import CAUSAL_LM, PAIR_LOGIT, SCALAR
from gram_engine.hf.mapping import INDEX, OUTPUT, SCORE, SINGLE, rules
from gram_engine.hf.safetensors_file import SafetensorsWriter


def export_hf(
    checkpoint: str | Path,
    folder: str | Path,
    dtype: Optional[str] = None,
    *,
    head: Optional[str] = None,
    processes: int = 1,
    verify: bool = False,
    evaluation: Optional[str] = None,
) -> Path:
    """Write `folder` from the newest checkpoint in `checkpoint`, with LoRA adapters merged into the weights.

    The folder gets its name only when it is complete.

    Args:
        dtype: torch's name for the dtype of the written weights; None: that of the checkpoint.
        head: CAUSAL_LM; PAIR_LOGIT for AutoModelForSequenceClassification with score.weight = W_A - W_B; or SCALAR for
            AutoModelForSequenceClassification with the scalar head of bradley-terry.  None: SCALAR for bradley-terry,
            otherwise CAUSAL_LM.
        verify: read everything back and compare it, bit for bit, with the checkpoint.
        evaluation: JSON report to show in the model card.

    Returns:
        `folder`.

    Raises:
        CheckpointError: there is no checkpoint, one of its files is damaged, a tensor is missing, or a written tensor
            differs.
        ConfigError: `folder` exists, the checkpoint has no such head, or the disk has too little space.
    """
    path, folder = _checkpoint_path(Path(checkpoint)), Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists. Remove it, or give another --save.")
    if evaluation:
        read_evaluation(evaluation)
    _refuse_damage(path, processes)
    config = run_config_of(path)
    head = _head_of(config, path, head)
    stored = TorchDistCheckpoint(path).shape_and_dtype("decoder.final_layernorm.weight", None)[1]
    temporary = folder.with_name(f".{folder.name}.tmp")
    jobs = _jobs(path, temporary, config.model, getattr(torch, dtype) if dtype else stored, head)
    check_room(folder.parent, jobs)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        run_jobs(_write_shard, jobs, processes, "write")
        _write_index(temporary, jobs)
        write_hf_metadata_files(jobs[0], config, head, evaluation)
        if verify:
            run_jobs(_verify_shard, jobs, processes, "verify")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _checkpoint_path(folder: Path) -> Path:
    path = latest_checkpoint(folder)
    if path is None:
        raise CheckpointError(f"{folder}: no checkpoint here. Give the --save folder of a run.")
    absent = [name for name in (RUN_CONFIG, DATA_MANIFEST, TEMPLATE, TOKENIZER) if not (path / name).exists()]
    if absent:
        raise CheckpointError(f"{path}: {', '.join(absent)} missing. Restore it from another checkpoint of the same run.")
    return path


def _head_of(config: Config, path: Path, wanted: Optional[str]) -> str:
    own = SCALAR if config.has_scalar_head else CAUSAL_LM
    if wanted is not None and (wanted == SCALAR) != (own == SCALAR):
        raise ConfigError(
            f"--head {wanted}: {path} was trained with --objective {config.training.objective}. Leave --head out for "
            f"what it has: {own}."
        )
    return wanted or own


def _refuse_damage(path: Path, threads: int) -> None:
    try:
        verify(path, threads=threads)
    except DamagedCheckpoint as error:
        raise CheckpointError(f"{error} Restore it, or give an older checkpoint: --load {path.parent}/iter_...") from None


def _jobs(path: Path, folder: Path, model: ModelConfig, dtype: torch.dtype, head: str) -> list[Job]:
    wanted = [(rule, layer) for rule, layer in rules(model) if head == CAUSAL_LM or rule is not OUTPUT]
    wanted += [(SCORE, None)] if head == SCALAR else []
    files = in_files(wanted, model, dtype)
    name = "model-{:05d}-of-{:05d}.safetensors" if len(files) > 1 else SINGLE
    jobs = [
        Job(number, path, folder, name.format(number + 1, len(files)), model, tuple(keys), dtype)
        for number, keys in enumerate(files)
    ]
    if head == PAIR_LOGIT:
        jobs[-1] = replace(jobs[-1], label_ids=label_ids_of(path))
    return jobs


def _shapes(job: Job) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for rule, layer in job.rules():
        shapes.update(zip(rule.hf_names(layer), rule.hf_shapes(job.model), strict=True))
    if job.label_ids:
        shapes.update(zip(SCORE.hf, SCORE.hf_shapes(job.model)))
    return shapes


def _tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of a job; one tensor of one layer of the checkpoint is in memory at a time."""
    checkpoint = TorchDistCheckpoint(job.checkpoint)
    for rule, layer in job.rules():
        tensor = _merged_tensor(checkpoint, rule.engine, layer, job.model)
        yield from zip(rule.hf_names(layer), rule.split(tensor, job.model), strict=True)
    if job.label_ids:
        row_a, row_b = checkpoint.tensor(*head_key(job.model))[list(job.label_ids)].float()
        yield SCORE.hf[0], (row_a - row_b)[None]


def _merged_tensor(checkpoint: TorchDistCheckpoint, key: str, layer: int | None, model: ModelConfig) -> Tensor:
    """A tensor of the checkpoint with its LoRA adapter merged, if it has one: W + alpha / rank * B A, fp32.

    If B is zero the result is W itself, bit for bit.
    """
    weight = checkpoint.tensor(key, layer)
    module, _, kind = key.rpartition(".")
    if model.lora_rank is None or kind != "weight" or not module.endswith(model.lora_modules):
        return weight
    a, b = (checkpoint.tensor(f"{module}.adapter.{name}.weight", layer).float() for name in ("linear_in", "linear_out"))
    return torch.addmm(weight.float(), b, a, alpha=model.lora_alpha / model.lora_rank) if b.any() else weight


def _write_shard(job: Job) -> None:
    writer = SafetensorsWriter(job.folder / job.file, _shapes(job), job.dtype)
    for name, tensor in _tensors(job):
        writer.write(name, tensor)
    writer.close()


def _verify_shard(job: Job) -> None:
    written = HuggingFaceFolder(job.folder)
    for name, tensor in _tensors(job):
        if not same_bits(written.read(name), tensor.to(job.dtype)):
            raise CheckpointError(f"{job.file}: {name} differs from the checkpoint after it was written. Check the disk.")


def _write_index(folder: Path, jobs: list[Job]) -> None:
    if len(jobs) == 1:
        return
    weight_map = {name: job.file for job in jobs for name in _shapes(job)}
    content = {"metadata": {"total_size": sum(job.nbytes for job in jobs)}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, content)
