"""A Hugging Face folder in the engine: its run's configuration, and its logits of packed sequences."""

import torch

from tests.support.tiny import packed, tiny_trainer


def packed_logits(prefix, tokenizer, folder, lengths, tokens):
    """Logits [tokens, vocabulary] of two packed sequences by the engine's model, loaded from a Hugging Face folder."""
    trainer = tiny_trainer(hf_run(prefix, tokenizer, folder, "--no-fused-losses"))
    positions, sequences = packed(lengths)
    with torch.no_grad():
        logits = trainer.model[0].module(tokens[None], positions, None, packed_seq_params=sequences)
    return logits[0, :, : trainer.config.model.vocab_size]


def hf_run(prefix, tokenizer, folder, flags=""):
    """The tiny run's configuration with the shape and the weights of a Hugging Face folder."""
    from gram_engine.config.parse import parse
    from gram_engine.model.shapes import resolve_shape

    run = f"--seq-length 192 --global-batch-size 8 --train-iters 4 --load-hf {folder} {flags}"
    config = parse([*run.split(), "--data-path", prefix, "--tokenizer-model", tokenizer])
    resolve_shape(config)
    return config
