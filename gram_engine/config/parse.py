"""From flags and YAML files to a configuration, and from an error to an exit.

YAML is turned into flags placed before the user's own, so one parser (tyro) types and checks both, and the command line wins.
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
    """Configuration from flags; `--config FILE.yaml` (may repeat) fills in what the flags leave open.

    `schema` is the dataclass of sections to fill; a file's keys that only the trainer knows are then passed over, so that
    one file can serve preprocessing and training.

    Raises:
        ConfigError: a YAML file is missing, or holds a key that is no flag.
        SystemExit: tyro's usual exit after `--help` or a badly typed flag.
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
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not keys and values. Write `name: value`, one a line.")
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
        raise ConfigError(f"{path}: '{key}' holds what no flag takes. Give a number, text, true or false, or a list of them.")
    return flag_words(name, value)


def flag_words(name: str, value: Any) -> list[str]:
    """A field's name (or a flag's) and value as words of a command line."""
    name, flag = name.replace("-", "_"), f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag, str(value)] if _is_optional_bool(name) else [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)] if value else []
    return [flag, str(value)]


def _is_optional_bool(name: str) -> bool:
    return ModelConfig.__annotations__.get(name) == "Optional[bool]"


def fail(error: GramError) -> NoReturn:
    """End a command-line tool with an error a user can mend: its text once, no traceback, the error's exit status.

    The main process says it.  A launcher ends all processes as soon as one has left, so the others give it time to; one that
    is still there after that has an error of its own, and says it.
    """
    if not is_main_process():
        time.sleep(SECONDS_FOR_MAIN)
    print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_status)
