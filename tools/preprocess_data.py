#!/usr/bin/env python
"""See `python tools/preprocess_data.py --help`; the code is in gram_engine.data.preprocess."""

from gram_engine.cli import run
from gram_engine.data.preprocess import main

if __name__ == "__main__":
    run(main)
