"""The folder of a run's checkpoints, without megatron-core: file names, publication, metadata files, pruning.

    FOLDER/latest_checkpointed_iteration.txt    written last
    FOLDER/iter_0000100/                        written as iter_0000100.NAME.tmp, renamed when complete
        __0_0.distcp ... .metadata common.pt    model and optimizer (sharded), schedule and position
        run_config.yaml data_manifest.json template.yaml tokenizer/
        source/                                 config.json and generation_config.json of the Hugging Face folder of --load-hf
        integrity.json                          size and checksum of every file (integrity.py)
    FOLDER/iter_0000100.old/                    for a moment, while step 100 is saved again
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import warnings
from pathlib import Path
from typing import Collection

from gram_engine.checkpoint.integrity import INTEGRITY, METADATA, DamagedCheckpoint
from gram_engine.config.parse import load_yaml
from gram_engine.config.schema import Config
from gram_engine.data.manifest import Manifest
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.files import fsync, write_atomically, write_json

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG, DATA_MANIFEST, TEMPLATE, TOKENIZER = "run_config.yaml", "data_manifest.json", "template.yaml", "tokenizer"
SOURCE = "source"
SOURCE_FILES = ("config.json", "generation_config.json")
NAME = re.compile(r"iter_(\d{7,})(\.old)?")


def checkpoint_folders(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, intact or damaged, in the order in which to try them; `folder` itself if it is a checkpoint.

    First comes the one that the tracker file names (even if it is missing), then earlier ones, newest first, then later ones:
    those exist if somebody resumed from an earlier step, or if the run was killed just before the tracker was written.
    """
    folder = Path(folder)
    if any((folder / name).is_file() for name in (METADATA, INTEGRITY, RUN_CONFIG)):
        return [folder]
    found: dict[int, Path] = {}
    for entry in sorted(folder.glob("iter_*")):
        match = NAME.fullmatch(entry.name)
        if match and entry.is_dir():
            found.setdefault(int(match[1]), entry)  # iter_N.old is sorted behind iter_N, and counts only if that is missing
    latest = _tracked(folder / TRACKER, max(found, default=None))
    if latest is None:
        return []
    found.setdefault(latest, iteration_folder(folder, latest))
    return [found[number] for number in sorted(found, key=lambda number: (number > latest, -number))]


def _tracked(tracker: Path, newest: int | None) -> int | None:
    """The step that the tracker file names; `newest` if there is no such file or it holds no number."""
    if not tracker.is_file():
        return newest
    content = tracker.read_bytes().strip()
    if content.isdigit():
        return int(content)
    if newest is None:
        raise CheckpointError(f"{tracker} holds no number but {content[:20]!r}, and there is no checkpoint beside it.")
    warnings.warn(f"{tracker} holds no number but {content[:20]!r}: the newest checkpoint counts, step {newest}.", stacklevel=3)
    return newest


def candidates(folder: str | Path) -> list[Path]:
    """The complete checkpoints among `checkpoint_folders`, in the same order; [] if no run has saved anything yet.

    Raises:
        CheckpointError: runs have saved here, but no checkpoint is complete.
    """
    found = checkpoint_folders(folder)
    complete = [path for path in found if (path / METADATA).is_file()]
    if found and not complete:
        raise CheckpointError(f"{found[0]} is missing or incomplete, and there is no other. Restore it, or use another folder.")
    return complete


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The first of `checkpoint_folders`, intact or not; None if no run has saved anything yet."""
    return next(iter(checkpoint_folders(folder)), None)


def iteration_folder(folder: str | Path, iteration: int) -> Path:
    """Path of the checkpoint of one step."""
    return Path(folder) / f"iter_{iteration:07d}"


def run_config_of(checkpoint: str | Path) -> Config:
    """The resolved configuration of the run that saved a checkpoint.

    Raises:
        DamagedCheckpoint: the file is missing, damaged, or not of this engine.
    """
    path, complaint = Path(checkpoint) / RUN_CONFIG, io.StringIO()
    if not path.is_file():
        raise DamagedCheckpoint(f"{path} is missing.")
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            config = load_yaml(path)
        if config.model.num_layers is not None:
            return config
        reason = "it describes no model"
    except (ConfigError, OSError, ValueError, AttributeError) as error:
        reason = str(error)
    except SystemExit:  # a value that its flag does not take, or a flag among the values
        reason = "a value does not fit its key"
    raise DamagedCheckpoint(f"{path} is damaged, or not of this engine ({reason}).")


def write_metadata_files(folder: Path, config: Config, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Write what loading and exporting a checkpoint need besides its tensors: configuration, data manifest, tokenizer ..."""
    config.save(folder / RUN_CONFIG)
    write_json(folder / DATA_MANIFEST, manifest.to_dict())
    with write_atomically(folder / TEMPLATE) as handle:
        handle.write(manifest.judge_template(DATA_MANIFEST).to_yaml())
    tokenizer.save_pretrained(folder / TOKENIZER)
    source = _source(config)
    if source is not None:
        (folder / SOURCE).mkdir()
        for name in SOURCE_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / SOURCE / name)


def _source(config: Config) -> Path | None:
    """Folder with SOURCE_FILES: --load-hf, or the source/ folder of the checkpoint that this run started from."""
    if config.model.load_hf:
        return Path(config.model.load_hf)
    for start in filter(None, (config.checkpoint.load, config.checkpoint.pretrained_checkpoint)):
        found = checkpoint_folders(start)
        if found:
            return next((path / SOURCE for path in found if (path / SOURCE).is_dir()), None)
    return None


def publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint, which is on disk, to its final name; then write that to the tracker file."""
    replaced = final.with_suffix(".old")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    fsync(final.parent)
    with write_atomically(final.parent / TRACKER) as handle:
        handle.write(str(int(final.name.removeprefix("iter_"))))
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Clean up after a process that was killed while it saved, or while it removed an old checkpoint."""
    for entry in folder.glob("iter_*.tmp"):
        shutil.rmtree(entry, ignore_errors=True)
    for entry in folder.glob(f".{TRACKER}.*.tmp"):
        entry.unlink(missing_ok=True)
    for entry in folder.glob("iter_*.old"):
        final = entry.with_suffix("")
        if final.exists():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.rename(final)


def prune(folder: Path, keep_last: int | None, keep_every: int | None, protected: Collection[Path]) -> None:
    """Remove complete checkpoints, except the newest `keep_last`, steps that are multiples of `keep_every`, and `protected`."""
    if keep_last is None:
        return
    named = [NAME.fullmatch(path.parent.name) for path in folder.glob(f"iter_*/{METADATA}")]
    numbers = [int(match[1]) for match in named if match and not match[2]]
    kept = set(sorted(numbers)[-keep_last:]) | {number for number in numbers if keep_every and number % keep_every == 0}
    safe = {path.resolve() for path in protected}
    for number in sorted(set(numbers) - kept):
        path = iteration_folder(folder, number)
        if path.resolve() not in safe:
            # Renamed first, so that a kill leaves no half removed checkpoint under a checkpoint's name.
            unnamed = path.rename(path.with_suffix(".pruned.tmp"))
            shutil.rmtree(unnamed, ignore_errors=True)
