#!/usr/bin/env python
"""See `python tools/benchmark_throughput.py --help`; the code is in gram_engine.benchmarks.throughput."""

from gram_engine.benchmarks.throughput import main

if __name__ == "__main__":
    main()
