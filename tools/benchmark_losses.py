#!/usr/bin/env python
"""See `python tools/benchmark_losses.py --help`; the code is in gram_engine.benchmarks.losses."""

from gram_engine.benchmarks.losses import main

if __name__ == "__main__":
    main()
