"""Reads flags and YAML files into a configuration, and ends a command with an error message.

A YAML file is turned into flags that are placed before the user's own: one parser (tyro) converts and checks both, and flags
on the command line override the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import tyro

from gram_engine.config.schema import Config, ModelConfig
from gram_engine.errors import ConfigError, GramError
from gram_engine.files import read_yaml
from gram_engine.log import is_main_process, redact

SECONDS_FOR_MAIN = 30


def parse(argv: list[str], prog: str = "gram", defaults: tuple[str, ...] = (), schema: type = Config) -> Config:
    """Configuration from flags; `--config FILE.yaml` (may repeat) gives values for flags that are not on the command line.

    `schema` is the dataclass of sections to fill.  Keys of a file that belong only to the trainer's Config are ignored for
    another schema, so that preprocessing and training can share one file.

    Raises:
        ConfigError: a YAML file is missing, or has a key that is not a flag.
        SystemExit: tyro exits after `--help` and after an invalid flag.
    """
    files, flags = _split_config_files(list(argv))
    from_files = [flag for file in files for flag in _flags_from_yaml(Path(file), schema)]
    try:
        return tyro.cli(
            schema,
            args=[*defaults, *from_files, *flags],
            prog=prog,
            description=f"{schema.__doc__} --config FILE.yaml reads flags from a file.",
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=is_main_process(),
        )
    except SystemExit as end:
        if end.code and files and is_main_process():
            print(f"Flags came from the command line and from {', '.join(files)}.", file=sys.stderr)
        raise


def load_yaml(path: str | Path) -> Config:
    """Configuration from a YAML file alone, such as a checkpoint's run_config.yaml."""
    return parse(["--config", str(path)])


def _split_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    files, flags = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            files.append(next(arguments, ""))
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            flags.append(argument)
    return files, flags


_SCALARS = (str, int, float, bool, date, type(None))


def _flag_names(schema: type) -> set[str]:
    return {f.name for section in dataclasses.fields(schema) for f in dataclasses.fields(section.default_factory)}


def _flags_from_yaml(path: Path, schema: type) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file.")
    content = read_yaml(path)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not keys and values. Write `name: value`, one per line.")
    sections = {section.name for section in dataclasses.fields(Config)}
    flags: list[str] = []
    for key, value in content.items():
        # A section such as "parallel:" may group keys; "model:" is a section when it holds a mapping, else the preset.
        grouped = key in sections and isinstance(value, dict)
        for name, entry in value.items() if grouped else [(key, value)]:
            flags += _flag(path, name, entry, schema)
    return flags


def _flag(path: Path, key: str, value: Any, schema: type) -> list[str]:
    name = str(key).replace("-", "_")
    if name in _flag_names(Config) - _flag_names(schema):
        return []
    if name not in _flag_names(schema):
        close = difflib.get_close_matches(name, _flag_names(schema), n=1)
        raise ConfigError(f"{path}: unknown key '{key}'." + (f" Did you mean '{close[0]}'?" if close else ""))
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, _SCALARS) and not str(entry).startswith("--") for entry in entries):
        raise ConfigError(f"{path}: no flag accepts the value of '{key}'. Give a number, text, a boolean, or a list of them.")
    return flag_words(name, value)


def flag_words(name: str, value: Any) -> list[str]:
    """The words of a command line that set a field (or flag) of this name to this value."""
    name, flag = name.replace("-", "_"), f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag, str(value)] if _is_optional_bool(name) else [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)] if value else []
    return [flag, str(value)]


def _is_optional_bool(name: str) -> bool:
    return ModelConfig.__annotations__.get(name) == "Optional[bool]"


def fail(error: GramError) -> NoReturn:
    """End a command with a user error: its message without a traceback, and the error's exit status.

    The main process prints it.  A launcher ends all processes as soon as one exits, so the others first wait for the main
    process; one that still runs after SECONDS_FOR_MAIN has an error of its own, and prints it.
    """
    if not is_main_process():
        time.sleep(SECONDS_FOR_MAIN)
    print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_status)
