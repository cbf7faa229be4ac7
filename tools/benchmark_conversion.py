#!/usr/bin/env python
"""See `python tools/benchmark_conversion.py --help`; the code is in gram_engine.benchmarks.conversion."""

from gram_engine.benchmarks.conversion import main

if __name__ == "__main__":
    main()
