"""Prefetched batches equal those of the loader, in the requested order, and errors of the thread are raised in training."""

from tests.support.tiny import tiny_config, tiny_trainer


def prefetched(prefix, tokenizer_model):
    import torch

    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, "--objective pair-preference --train-iters 4"))
    made, batch_of = [], trainer.loader.batch
    trainer.loader.batch = lambda consumed: made.append(consumed) or batch_of(consumed)
    same = []
    for consumed in (0, 8, 16, 0, 24):  # in order, then back, then forward
        found, expected = trainer.batches.batch(consumed), batch_of(consumed)
        same.append(torch.equal(torch.from_numpy(found.sample_ids), torch.from_numpy(expected.sample_ids)))
        pairs = zip(found.microbatches, expected.microbatches, strict=True)
        same.append(all(torch.equal(ours.tokens, theirs.tokens) for ours, theirs in pairs))
        same.append(found.is_placed)
    trainer.batches._thread.shutdown()
    return all(same), made


def failing(prefix, tokenizer_model):
    trainer = tiny_trainer(tiny_config(prefix, tokenizer_model, "--objective pair-preference"))

    def broken(consumed, batch_of=trainer.loader.batch):
        if consumed == 8:
            raise OSError("the disk is gone")
        return batch_of(consumed)

    trainer.loader.batch = broken
    trainer.batches.batch(0)  # the thread runs into the error now
    try:
        trainer.batches.batch(8)
    except OSError as error:
        return str(error)


def test_batches_are_the_loaders(pool, tiny_data):
    same, made = pool.run(prefetched, 1, tiny_data["stage2"], tiny_data["tokenizer"])[0]
    assert same
    assert sorted(made) == sorted([0, 8, 16, 24, 0, 8, 24]), "each once, one ahead, none behind the end of training"


def test_an_error_of_the_thread_is_raised(pool, tiny_data):
    assert pool.run(failing, 1, tiny_data["stage2"], tiny_data["tokenizer"])[0] == "the disk is gone"
