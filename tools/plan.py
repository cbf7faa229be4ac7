#!/usr/bin/env python
"""See `python tools/plan.py --help`; the code is in gram_engine.planning.command."""

from gram_engine.cli import run
from gram_engine.planning.command import main

if __name__ == "__main__":
    run(main)
