"""What the workers of tests.support.pool need: the server that forks them imports it once."""

import gc
import importlib

from gram_engine.platform import device

device.initialise("cpu")
for module in (
    "gram_engine.training.trainer",
    "gram_engine.training.session",
    "transformers.models.auto.tokenization_auto",
    "sentencepiece",
    "torch._dynamo",  # torch imports it with the first optimizer
):
    importlib.import_module(module)
gc.freeze()  # the collection after each run then looks at the objects of that run alone
