"""Checkpoints survive faults: no fault of tests/support/faults.py loses a state; and tests of each safeguard."""

import io
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from gram_engine.checkpoint.folder import candidates, run_config_of
from gram_engine.checkpoint.integrity import seal
from gram_engine.errors import CheckpointError, ConfigError
from tests.support.faults import FAULTS, try_fault
from tests.support.hand_made import load, meant, save, with_flags
from tests.support.pool import worker_context
from tests.support.tiny import tiny_config


def hide_gpus():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module")
def tries(tiny_data, tmp_path_factory):
    """{fault: future of its outcomes}; two faults are tried at a time, in processes without process groups."""
    with ProcessPoolExecutor(2, mp_context=worker_context(), initializer=hide_gpus) as executor:
        yield {
            fault.name: executor.submit(try_fault, fault.name, tmp_path_factory.mktemp("fault"), tiny_data) for fault in FAULTS
        }
        executor.shutdown(cancel_futures=True)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_no_fault_loses_a_state(fault, tries):
    assert tries[fault.name].result(timeout=280).total() >= fault.at_least


@pytest.fixture(scope="module")
def config(tiny_data):
    return tiny_config(tiny_data["stage2"], tiny_data["tokenizer"], "--num-layers 1")


def save_steps(config, folder, steps, resumed_from=None, **options):
    from gram_engine.training.initialise import start_model_parallel

    start_model_parallel(config)
    for step in steps:
        save(with_flags(config, folder, **options), step, resumed_from=resumed_from).finish()
    return sorted(path.name for path in Path(folder).glob("iter_*"))


def load_newest(config, folder, **options):
    """(step that was loaded, log lines), or the text of the error."""
    from gram_engine.training.initialise import start_model_parallel

    start_model_parallel(config)
    try:
        found, lines, path = load(with_flags(config, folder, **options))
    except CheckpointError as error:
        return str(error)
    step = int(path.name.removeprefix("iter_"))
    assert found == meant(config, step)
    return step, lines


@pytest.mark.parametrize("resumed, kept", [(None, (4, 5, 6)), (1, (1, 4, 5, 6))])
def test_old_checkpoints_are_removed_but_every_kth_and_the_one_resumed_from(resumed, kept, pool, config, tmp_path):
    start = resumed and tmp_path / f"iter_{resumed:07d}"
    options = {"keep_last": 2, "keep_every": 4}
    found = pool.run(save_with, 1, config, str(tmp_path), range(1, 7), start, options)[0]
    assert found == [f"iter_{step:07d}" for step in kept]


def save_with(config, folder, steps, resumed_from, options):
    return save_steps(config, folder, steps, resumed_from, **options)


def end_by_an_error(config, folder):
    """Rank 0 drains; the other rank ends without a collective."""
    import torch.distributed as dist

    from gram_engine.training.initialise import start_model_parallel

    start_model_parallel(config)
    saver = save(with_flags(config, folder, async_save=True), 3)
    if dist.get_rank() == 0:
        saver.drain()
        saver.drain()  # nothing is left to do


def test_a_checkpoint_being_written_when_training_fails_is_completed(pool, config, tmp_path):
    pool.run(end_by_an_error, 2, config, str(tmp_path))
    assert pool.run(load_newest, 1, config, str(tmp_path))[0][0] == 3


def test_damage_is_agreed_on_by_all_processes_and_at_other_layouts(pool, config, tmp_path):
    pool.run(save_steps, 2, config, str(tmp_path), (1, 2))
    shard = tmp_path / "iter_0000002" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for processes in (2, 1):
        for step, lines in pool.run(load_newest, processes, config, str(tmp_path)):
            assert step == 1 and "__1_0.distcp was changed after it was written" in lines[0]
    refused = pool.run(load_strictly, 2, config, str(tmp_path))
    assert all("__1_0.distcp" in error and "Without --strict-load" in error for error in refused)


def load_strictly(config, folder):
    return load_newest(config, folder, strict_load=True)


def save_to_a_full_disk(config, folder):
    usage = shutil.disk_usage(folder)._replace(free=1000)
    with mock.patch("shutil.disk_usage", lambda _: usage), pytest.raises(CheckpointError) as error:
        save_steps(config, folder, (2,))
    return str(error.value)


def test_a_full_disk_is_foreseen_by_all_processes(pool, config, tmp_path):
    pool.run(save_steps, 2, config, str(tmp_path), (1,))
    for error in pool.run(save_to_a_full_disk, 2, config, str(tmp_path)):
        assert "GB are needed" in error and "GB free. Nothing was written" in error and "--keep-last" in error
    assert [path.name for path in sorted(tmp_path.glob("iter_*"))] == ["iter_0000001"]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def torch_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def plant(checkpoint, what, marker):
    """Put code into the file that `what` names, and write new checksums, as an attacker would."""
    evil = Evil(marker)
    if what == "common.pt":
        (checkpoint / "common.pt").write_bytes(torch_file(evil))
    elif what == ".metadata":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(evil))
    else:
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        stored = next(value for key, value in metadata.storage_data.items() if "_extra_state" in key.fqn)
        tensor = torch.frombuffer(bytearray(pickle.dumps(evil)), dtype=torch.uint8)
        content = torch_file([evil if what == "object" else tensor])
        shard = checkpoint / stored.relative_path
        stored.offset, stored.length = shard.stat().st_size, len(content)
        shard.write_bytes(shard.read_bytes() + content)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint, {})


@pytest.mark.parametrize("what", ["common.pt", ".metadata", "object", "tensor for Transformer Engine"])
def test_no_checkpoint_runs_code(what, pool, config, tmp_path):
    pool.run(save_steps, 1, config, str(tmp_path), (1, 2))
    plant(tmp_path / "iter_0000002", what, tmp_path / "code_ran")
    error = pool.run(load_newest, 1, config, str(tmp_path))[0]
    assert "would run code when it is loaded" in error and "system" in error
    assert not (tmp_path / "code_ran").exists()


def test_checkpoints_from_before_checksums(pool, config, tmp_path):
    pool.run(save_steps, 1, config, str(tmp_path), (1, 2))
    for path in tmp_path.glob("iter_*/integrity.json"):
        path.unlink()
    step, lines = pool.run(load_newest, 1, config, str(tmp_path))[0]
    assert step == 2 and "from before there were checksums" in lines[0]
    shard = tmp_path / "iter_0000002" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 100)
    step, lines = pool.run(load_newest, 1, config, str(tmp_path))[0]
    assert step == 1 and "__0_0.distcp has" in lines[0]


def test_conversion_refuses_damage(pool, config, tmp_path):
    from gram_engine.convert.export_hf import export_hf

    pool.run(save_steps, 1, config, str(tmp_path / "run"), (1,))
    os.truncate(tmp_path / "run" / "iter_0000001" / "tokenizer" / "tokenizer.json", 100)
    with pytest.raises(CheckpointError, match="tokenizer.json has 100 bytes, not .* Restore it, or give an older checkpoint"):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["model: [", "no_such_key: 1", "num_layers: many", "", "save: --help", "just words"])
def test_run_config_that_is_damaged_or_foreign_is_named(content, tmp_path):
    (tmp_path / "run_config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match="run_config.yaml is damaged, or not of this engine"):
        run_config_of(tmp_path)


def test_a_folder_with_traces_of_checkpoints_is_not_taken_for_a_new_one(tmp_path):
    assert candidates(tmp_path) == []
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(CheckpointError, match="iter_0000005 is missing or incomplete, and there is no other"):
        candidates(tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--save run --keep-last 0", "--keep-last 0 must be at least 1"),
        ("--save run --keep-last 2 --keep-every 0", "--keep-every 0 must be at least 1"),
        ("--save run --keep-every 4", "--keep-every 4 is an exception to --keep-last"),
    ],
)
def test_flags_of_pruning(flags, message, tiny_data):
    from gram_engine.config.validate import check

    with pytest.raises(ConfigError, match=message):
        check(tiny_config(tiny_data["stage2"], tiny_data["tokenizer"], flags), world_size=1)
