#!/usr/bin/env python
"""See `python tools/score.py --help`; the code is in gram_engine.scoring.score_file."""

from gram_engine.scoring.score_file import main

if __name__ == "__main__":
    main()
