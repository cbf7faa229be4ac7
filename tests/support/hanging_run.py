"""A run whose rank 1 sleeps before its fifth step, as with a dead network or file system. Used by test_interruptions."""

import os
import time

from gram_engine.data.loader import PackedLoader
from gram_engine.training.main import finetune

if __name__ == "__main__":
    batch = PackedLoader.batch

    def batch_or_sleep(loader: PackedLoader, consumed_samples: int):
        if os.environ["RANK"] == "1" and consumed_samples == 4 * loader.global_batch_size:
            time.sleep(600)
        return batch(loader, consumed_samples)

    PackedLoader.batch = batch_or_sleep
    finetune()
