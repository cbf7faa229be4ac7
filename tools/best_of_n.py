#!/usr/bin/env python
"""See `python tools/best_of_n.py --help`; the code is in gram_engine.evaluation.best_of_n."""

from gram_engine.evaluation.best_of_n import main

if __name__ == "__main__":
    main()
