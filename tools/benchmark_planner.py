#!/usr/bin/env python
"""See `python tools/benchmark_planner.py --help`; the code is in gram_engine.benchmarks.planned_memory."""

from gram_engine.benchmarks.planned_memory import main

if __name__ == "__main__":
    main()
