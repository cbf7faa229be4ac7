#!/usr/bin/env python
"""See `python tools/benchmark_saving.py --help`; the code is in gram_engine.benchmarks.saving."""

from gram_engine.benchmarks.saving import main

if __name__ == "__main__":
    main()
