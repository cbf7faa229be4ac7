#!/usr/bin/env python
"""See `python tools/benchmark_peers.py --help`; the code is in gram_engine.benchmarks.peers."""

from gram_engine.benchmarks.peers import main

if __name__ == "__main__":
    main()
