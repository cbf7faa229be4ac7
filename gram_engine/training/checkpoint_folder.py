"""The folder of a run's checkpoints, without megatron-core: names of its files, how one becomes visible, what lies beside.

    FOLDER/latest_checkpointed_iteration.txt    written last
    FOLDER/iter_0000100/                        written as iter_0000100.tmp, renamed when whole
        __0_0.distcp ... .metadata common.pt    model and optimizer (sharded), schedule and position
        run_config.yaml data_manifest.json template.yaml tokenizer/
        source/                                 config.json and generation_config.json of the Hugging Face folder it began from
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from gram_engine.command_line import load_yaml
from gram_engine.config import Config
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError
from gram_engine.fileio import write_atomically

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG, DATA_MANIFEST, TEMPLATE, TOKENIZER = "run_config.yaml", "data_manifest.json", "template.yaml", "tokenizer"
SOURCE = "source"
SOURCE_FILES = ("config.json", "generation_config.json")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that the tracker file names, or `folder` itself where it is one; None where there is none.

    Raises:
        CheckpointError: the tracker names a checkpoint that is not there.
    """
    folder = Path(folder)
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    found = iteration_folder(folder, int(tracker.read_text()))
    if not (found / ".metadata").is_file():
        raise CheckpointError(f"{tracker} names {found.name}, which is missing or incomplete. Write another number there.")
    return found


def iteration_folder(folder: str | Path, iteration: int) -> Path:
    """Where the checkpoint of one step lies."""
    return Path(folder) / f"iter_{iteration:07d}"


def run_config_of(checkpoint: str | Path) -> Config:
    """The resolved configuration that a checkpoint was saved with."""
    return load_yaml(Path(checkpoint) / RUN_CONFIG)


def write_companions(folder: Path, config: Config, manifest: dict) -> None:
    """What a checkpoint needs beside its tensors to be understood, and exported, later."""
    config.save(folder / RUN_CONFIG)
    with write_atomically(folder / DATA_MANIFEST) as handle:
        json.dump(manifest, handle, indent=1)
    template = {key: value for key, value in manifest["template"].items() if key != "sha256"}
    with write_atomically(folder / TEMPLATE) as handle:
        handle.write(JudgeTemplate.from_dict(template, DATA_MANIFEST).to_yaml())
    Tokenizer.load(config.data.tokenizer_type, config.data.tokenizer_model).save_pretrained(folder / TOKENIZER)
    source = _source(config)
    if source is not None:
        (folder / SOURCE).mkdir()
        for name in SOURCE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / SOURCE / name)


def _source(config: Config) -> Path | None:
    """The Hugging Face folder's files, from itself or from the checkpoint that this run began with."""
    if config.model.load_hf:
        return Path(config.model.load_hf)
    for start in filter(None, (config.checkpoint.load, config.checkpoint.pretrained_checkpoint)):
        found = latest_checkpoint(start)
        if found is not None:
            return found / SOURCE if (found / SOURCE).is_dir() else None
    return None


def publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name, then point the tracker at it."""
    replaced = final.with_suffix(".old")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _fsync_folder(final.parent)
    with write_atomically(final.parent / TRACKER) as handle:
        handle.write(str(int(final.name.removeprefix("iter_"))))
    shutil.rmtree(replaced, ignore_errors=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
