"""README, CONTRIBUTING and the walk-through name files, targets, commands and flags that exist; dry runs of configurations."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from gram_engine import cli
from gram_engine.config import schema
from gram_engine.training.launch import split_flags
from gram_engine.training.main import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "examples/docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *(path.relative_to(ROOT).as_posix() for path in DOCS))
CONFIGS = sorted((ROOT / "examples/configs").glob("*.yaml"))
RUNS = [file for file in CONFIGS if not file.name.endswith("template.yaml")]
SECTIONS = [section.default_factory for section in dataclasses.fields(schema.Config)]
FLAGS = {f"--{field.name.replace('_', '-')}" for section in SECTIONS for field in dataclasses.fields(section)}
SCRIPTS = ("examples/pretrain_gram.sh", "examples/finetune_gram.sh")


def commands(page: str) -> list[list[str]]:
    """The commands in a page's bash blocks, line continuations joined, comments and loops' frames left out."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] not in ("for", "done", "wait", "...the")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_existing_files_targets_and_flags(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands(page):
        if command[0] == "make":
            assert command[1] in targets, command
            continue
        assert command[0] in ("torchrun", "bash", "gram"), command
        if command[0] == "gram":
            assert command[1] in cli.COMMANDS, command
        script = next((word for word in command if word.startswith("examples/") and word.endswith(".sh")), None)
        if script:
            check_trainer_flags(script, command[command.index(script) + 1 :])


def check_trainer_flags(script: str, words: list[str]) -> None:
    assert script in SCRIPTS
    _, flags = split_flags([word for word in words if word != "&"])
    for word in flags:
        assert not word.startswith("--") or word in FLAGS | {"--config"}, word
    for file in (word for word in flags if word.startswith("examples/")):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [(ROOT / page).parent / target for target in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    named = [ROOT / path for path in re.findall(r"`((?:gram_engine|examples|tests|tools)/[\w./-]+)`", text)]
    for path in linked + named:
        assert path.exists(), path


def test_flag_table_names_flags():
    rows = re.findall(r"^\| (`--.*?) \|", (ROOT / "examples/docs/flags.md").read_text(encoding="utf-8"), re.MULTILINE)
    flags = [flag for row in rows for flag in re.findall(r"`(--[a-z0-9-]+)`", row)]
    assert len(flags) > 20
    assert set(flags) <= FLAGS


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_dry_run_of_a_configuration(file, tmp_path, monkeypatch, capsys):
    """In two processes, as far as a dry run sees them; a stage's file gets a model, a model's file a stage."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer.model").write_text("")
    given = ["--config", str(file), "--data", f"{tmp_path}/rows.jsonl", "--tokenizer-model", f"{tmp_path}/tokenizer.model"]
    stage = [] if "train_" in file.read_text(encoding="utf-8") else ["--config", "examples/configs/stage2-paper.yaml"]
    main([*stage, *given, "--save", str(tmp_path / "run"), "--dry-run"], "gram finetune", ("--model", "tiny"))
    resolved = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    flat = {name: value for section in resolved.values() for name, value in section.items()}
    for name, value in {**written, **written.get("parallel", {})}.items():
        assert name == "parallel" or flat[name] == value, name
