#!/usr/bin/env python
"""See `python tools/soak.py --help`; the code is in gram_engine.benchmarks.soak."""

from gram_engine.benchmarks.soak import main

if __name__ == "__main__":
    main()
