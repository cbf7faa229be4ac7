#!/usr/bin/env python
"""See `python tools/reproduce.py --help`; the code is in gram_engine.reproduce.command."""

from gram_engine.reproduce.command import main

if __name__ == "__main__":
    main()
