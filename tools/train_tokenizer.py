#!/usr/bin/env python
"""See `python tools/train_tokenizer.py --help`; the code is in gram_engine.train_tokenizer."""

from gram_engine.train_tokenizer import main

if __name__ == "__main__":
    main()
