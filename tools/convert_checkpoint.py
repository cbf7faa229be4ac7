#!/usr/bin/env python
"""See `python tools/convert_checkpoint.py --help`; the code is in gram_engine.convert.command."""

from gram_engine.cli import run
from gram_engine.convert.command import main

if __name__ == "__main__":
    run(main)
