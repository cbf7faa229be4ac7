#!/usr/bin/env python
"""See `python tools/benchmark_planner.py --help`; the code is in gram_engine.benchmarks.planner."""

from gram_engine.benchmarks.planner import main

if __name__ == "__main__":
    main()
