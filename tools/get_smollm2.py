#!/usr/bin/env python
"""See `python tools/get_smollm2.py --help`; the code is in gram_engine.hf.smollm2."""

from gram_engine.cli import run
from gram_engine.hf.smollm2 import main

if __name__ == "__main__":
    run(main)
