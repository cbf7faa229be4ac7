#!/usr/bin/env python
"""See `python tools/evaluate.py --help`; the code is in gram_engine.evaluation.evaluate."""

from gram_engine.cli import run
from gram_engine.evaluation.evaluate import main

if __name__ == "__main__":
    run(main)
