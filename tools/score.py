#!/usr/bin/env python
"""See `python tools/score.py --help`; the code is in gram_engine.scoring.command."""

from gram_engine.cli import run
from gram_engine.scoring.command import main

if __name__ == "__main__":
    run(main)
