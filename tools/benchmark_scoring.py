#!/usr/bin/env python
"""See `python tools/benchmark_scoring.py --help`; the code is in gram_engine.benchmarks.scoring."""

from gram_engine.benchmarks.scoring import main

if __name__ == "__main__":
    main()
