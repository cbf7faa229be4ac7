"""Files of strangers: nothing in them runs, none leads out of its folder, lies are found. And tokens are never printed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gram_engine.config.parse import fail
from gram_engine.config.schema import Config
from gram_engine.convert.export_hf import export_hf
from gram_engine.convert.import_checkpoint import import_checkpoint
from gram_engine.data.dataset import PairDataset
from gram_engine.data.template import JudgeTemplate
from gram_engine.errors import CheckpointError, ConfigError
from gram_engine.hf.folder import HuggingFaceFolder
from gram_engine.hf.safetensors_file import SafetensorsReader
from gram_engine.log import MASK, SECRETS, redact
from gram_engine.scoring.scorer import RewardModelScorer
from tests.conftest import TEMPLATE
from tests.support.data_faults import Fault, changed, refused, resealed
from tests.support.mutations import VALUES, damaged_bytes


class Trap:
    """Unpickled, it makes a file: the sign that code of a file has run."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return Path.touch, (self.sign,)


# --- safetensors -------------------------------------------------------------------------------------------------------

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(3, 2)}


def lying_header(work, draw) -> str:
    """Offsets, shapes or dtypes of a safetensors file are changed. The safetensors package is the judge."""
    path = work.file("lying.safetensors")
    save_file(TENSORS, path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = draw.choice(list(TENSORS))
    start, end = header[name]["data_offsets"]
    numbers = (0, 1, -1, 8, 24, 48, 56, 1 << 31, 1 << 63, 1 << 64, draw.randrange(64), 4.0, "8", None, True, [])
    kind = draw.choice(("start", "end", "shift", "shape", "dtype", "gone", "twice", "length", "body", "entry", "deep", "all"))
    if kind in ("start", "end", "shift"):
        new = draw.choice(numbers)
        whole_number = isinstance(new, int) and not isinstance(new, bool)
        moved = [start + new, end + new] if whole_number else [start]
        header[name]["data_offsets"] = {"start": [new, end], "end": [start, new], "shift": moved}[kind]
    elif kind == "shape":
        shapes = ([], [draw.choice(numbers)], [2, draw.choice(numbers)], [1 << 62, 4], [6, 1], "2", None)
        header[name]["shape"] = draw.choice(shapes)
    elif kind == "dtype":
        header[name]["dtype"] = draw.choice(("F32", "BF16", "F64", "I32", "U8", "F8_E4M3", "", "PICKLE", 3, None, ["F32"]))
    elif kind in ("gone", "twice"):
        entry = header.pop(name) if kind == "gone" else header[name]
        if kind == "twice":
            header["d"] = entry
    elif kind == "entry":
        header[name] = draw.choice(([], None, "x", {}, 3, {"dtype": "F32"}))
    elif kind == "body":
        body = draw.choice((body[:-1], body + b"\x00", b"", body * 2))
    encoded = draw.choice((b"[1]", b"null", b"{", b"\xff\xff", b"{}")) if kind == "all" else json.dumps(header).encode()
    if kind == "deep":
        encoded = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    announced = draw.choice((0, 1, len(encoded) + 1, 1 << 40, (1 << 64) - 1)) if kind == "length" else len(encoded)
    path.write_bytes(announced.to_bytes(8, "little") + encoded + body)
    outcome = refused(lambda: SafetensorsReader(path), str(path))
    if outcome == "opened":
        with safe_open(path, "pt") as theirs:
            ours = SafetensorsReader(path)
            assert set(ours.entries) == set(theirs.keys())
            assert all(torch.equal(ours.read(key), theirs.get_tensor(key)) for key in ours.entries)
        return "read as the safetensors package reads it"
    return outcome


def test_what_the_safetensors_package_refuses_is_refused(fault_work):
    """Overlapping tensors, a gap, bytes behind the last tensor: each is refused by both."""
    path = fault_work.file("strict.safetensors")
    entry = {"dtype": "F32", "shape": [2]}
    for offsets, size in (([0, 8], [0, 8]), 8), (([0, 8], [4, 12]), 12), (([0, 8], [12, 20]), 20), (([0, 8], [8, 16]), 24):
        header = json.dumps({name: {**entry, "data_offsets": place} for name, place in zip("ab", offsets)}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        with pytest.raises(SafetensorError):
            safe_open(path, "pt")
        with pytest.raises(CheckpointError, match="strict.safetensors: not a whole safetensors file"):
            SafetensorsReader(path)


def leading_out(work, draw) -> str:
    """An index names files elsewhere, which exist and hold the right tensors."""
    folder = work.file("out/folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, folder.parent / "secret.safetensors")
    (folder / "sub").mkdir(exist_ok=True)
    shutil.copy(folder.parent / "secret.safetensors", folder / "sub")
    file = "secret.safetensors"
    out = (f"../{file}", f"{folder.parent}/{file}", f"sub/{file}", f"sub/../../{file}", f"./../{file}", "..", ".", "", "/", "~")
    name = draw.choice((*out, "secret.bin", "x\x00.safetensors", 3, None, ["a"]))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, name)}))
    return refused(lambda: HuggingFaceFolder(folder).read("a"), str(folder))


# --- Hugging Face folders ----------------------------------------------------------------------------------------------


def pickled_weights(work, draw) -> str:
    """Weights as pickles that run code: refused where they are alone, not looked at beside safetensors."""
    folder, sign = work.file("pickles"), work.file("pickles-ran")
    shutil.copytree(work.reward_model, folder, dirs_exist_ok=True)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Trap(sign)))
    assert RewardModelScorer.from_pretrained(folder).score("x", "a", "b") == work.score
    (folder / "model.safetensors").unlink()
    outcome = refused(lambda: RewardModelScorer.from_pretrained(folder), "are pickles, which can run code", "save_pretrained")
    assert not sign.exists()
    return outcome


CODE = """
from pathlib import Path
Path({sign!r}).touch()
from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T
"""


def with_code(work, folder: Path, sign: Path) -> Path:
    """The reward model's folder with an auto_map to code in it that makes a file."""
    shutil.copytree(work.reward_model, folder)
    (folder / "evil.py").write_text(CODE.format(sign=str(sign)))
    maps = {
        "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "evil.T"]},
    }
    for name, auto_map in maps.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": auto_map}))
    return folder


def test_code_of_a_folder_does_not_run_and_is_not_passed_on(fault_work, tmp_path):
    """By scoring, import and export; nor does a link in a checkpoint's tokenizer folder bring another file into the export."""
    sign = tmp_path / "ran"
    folder = with_code(fault_work, tmp_path / "folder", sign)
    assert RewardModelScorer.from_pretrained(folder).score("x", "a", "b") == fault_work.score
    checkpoint = import_checkpoint(folder, tmp_path / "run", template=TEMPLATE)
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "tokenizer" / "notes.txt").symlink_to(tmp_path / "secret")
    exported = export_hf(tmp_path / "run", tmp_path / "exported")
    assert not sign.exists() and not (exported / "notes.txt").exists() and not list(exported.glob("*.py"))
    assert not any("auto_map" in file.read_text() for file in exported.glob("*.json"))
    assert RewardModelScorer.from_pretrained(exported).score("x", "a", "b") == fault_work.score


def test_a_folder_of_links_loads_as_the_files_they_lead_to(fault_work, tmp_path):
    """The hub's cache looks so: where links lead is the user's affair; names in an index are the stranger's."""
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(fault_work.reward_model.iterdir()):
        shutil.copy(file, tmp_path / f"blob{number}")
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / f"blob{number}")
    assert RewardModelScorer.from_pretrained(tmp_path / "snapshot").score("x", "a", "b") == fault_work.score


def folder_json(work, draw) -> str:
    """config.json or gram_config.json of an exported folder is damaged, or holds a value that none has."""
    folder = work.reward_model
    path = folder / draw.choice(("config.json", "gram_config.json"))
    content = path.read_bytes()
    if draw.random() < 0.7:
        fields = json.loads(content)
        at = fields[draw.choice([k for k, v in fields.items() if isinstance(v, dict)])] if draw.random() < 0.2 else fields
        at[draw.choice(list(at))] = "@@"
        content = json.dumps(fields).replace('"@@"', draw.choice((*VALUES, "3", "7", "1e9", "48", "1000000000"))).encode()
    else:
        content = damaged_bytes(draw, content)
    with changed(path, content):
        scores: list[float] = []
        outcome = refused(lambda: scores.append(RewardModelScorer.from_pretrained(folder).score("x", "a", "b")), str(folder))
        assert all(0 <= score <= 1 for score in scores), scores
        return outcome


def pickled_rows(work, draw) -> str:
    """.samples.npy holds a pickle that runs code, and the checksums agree."""
    prefix, sign = work.file("pair-preference"), work.file("rows-ran")
    path = work.file("pair-preference.samples.npy")
    rows = np.empty(len(np.load(path)), dtype=object)
    rows[0] = Trap(sign)
    np.save(work.file("trap.npy"), rows, allow_pickle=True)
    with resealed(prefix, path, work.file("trap.npy").read_bytes()):
        outcome = refused(lambda: PairDataset(prefix), str(prefix), "reprocess")
    assert not sign.exists()
    return outcome


def test_names_of_templates_do_not_lead_anywhere(monkeypatch, tmp_path):
    """A name is one that ships, or a file; it is not looked for around the shipped ones."""
    (tmp_path / "t.yaml").write_text(Path(TEMPLATE).read_text())
    assert JudgeTemplate.load(tmp_path / "t.yaml").name == JudgeTemplate.load(TEMPLATE).name
    for name in (tmp_path / "t", "../templates/gram-code", "gram-code/../gram-code", "", ".", "x\x00"):
        with pytest.raises(ConfigError, match="neither a template of the engine"):
            JudgeTemplate.load(name)


# --- tokens ------------------------------------------------------------------------------------------------------------

HUB_TOKEN = "hf_" + "aB3" * 11 + "x"


def test_tokens_are_masked_in_logs_errors_and_the_configuration(monkeypatch, capsys):
    from gram_engine.log import log

    secrets = ("0123456789abcdef" * 2, "not-of-the-usual-form", "s3cret-value")
    for name, value in zip(SECRETS, secrets, strict=True):
        monkeypatch.setenv(name, f" {value}\n")
    everything = " and ".join([*secrets, HUB_TOKEN])
    log(f"log {everything}")
    with pytest.raises(SystemExit):
        fail(ConfigError(f"error {everything}"))
    config = Config()
    config.logging.wandb_exp_name, config.data.data = everything, (f"hf:name?token={HUB_TOKEN}",)
    printed = "".join(capsys.readouterr()) + config.to_yaml()
    assert not any(value in printed for value in (*secrets, HUB_TOKEN)) and printed.count(MASK) >= 12
    assert "log " in printed and "error: error " in printed


def test_ordinary_text_is_not_masked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for text in ("a llama", "hf_hub_download", "runs/hf_model_of_ours", "hf:name", "--load-hf x", "half_" + "a" * 40):
        assert redact(text) == text


FAULTS = [
    Fault("safetensors header lies", "offsets, shapes, dtypes, overlaps, gaps, lengths, nesting", lying_header, 1000, 50_000,
          ("refused", "read as the safetensors package reads it"), 0.9),
    Fault("index of safetensors leads out of its folder", "`..`, absolute paths, folders, other kinds of files", leading_out,
          60, 600),
    Fault("weights are pickles that run code", "`pytorch_model.bin` and others, alone and beside safetensors", pickled_weights,
          1, 10),
    Fault("`.samples.npy` is a pickle that runs code", "checksums agree", pickled_rows, 2, 10),
    Fault("damaged `config.json`, `gram_config.json`", "values and bytes changed, then scored", folder_json, 100, 3000,
          ("refused", "opened"), 0.8),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, fault_work):
    fault.run(fault_work)
