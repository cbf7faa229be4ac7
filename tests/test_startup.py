"""Start-up opens each data set and loads the tokenizer once, whether the data is preprocessed or not."""

import collections
from unittest import mock

from tests.support.tiny import tiny_config, tiny_trainer


def openings(data_flags: str, prefix, tokenizer_model, folder):
    """How often a run opens data sets and loads tokenizers, from its start to its first checkpoint."""
    from gram_engine.data import dataset, sources, tokenizer

    counts = collections.Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    config = tiny_config(prefix, tokenizer_model, f"--save {folder}/run {data_flags}")
    if "--data " in f"{data_flags} ":
        config.data.data_path = None
    with (
        mock.patch.object(dataset.PairDataset, "__init__", counted("data sets", dataset.PairDataset.__init__)),
        mock.patch.object(tokenizer.Tokenizer, "load", counted("tokenizers", tokenizer.Tokenizer.load)),
        mock.patch.object(sources, "sha256_of_file", counted("hashes", sources.sha256_of_file)),
    ):
        trainer = tiny_trainer(config)
        trainer.advance()
        trainer.save()
        trainer.saver.finish()
    return dict(counts)


def test_preprocessed_data(pool, tiny_data, tmp_path):
    (counts,) = pool.run(openings, 1, "", tiny_data["stage2"], tiny_data["tokenizer"], tmp_path)
    assert counts == {"data sets": 1, "tokenizers": 1}


def test_data_in_the_cache(pool, tiny_data, tmp_path):
    """Raw files are hashed to find the preprocessed ones."""
    template = "--template examples/configs/quickstart-template.yaml"
    flags = f"--data {tiny_data['jsonl']} --valid-data {tiny_data['jsonl']} --data-cache-path {tmp_path} {template}"
    run = (flags, tiny_data["stage2"], tiny_data["tokenizer"], tmp_path)
    pool.run(openings, 1, *run)
    (counts,) = pool.run(openings, 1, *run)
    assert counts == {"data sets": 2, "tokenizers": 1, "hashes": 2}
