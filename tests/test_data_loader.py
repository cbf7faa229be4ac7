"""Preprocessing, packing and the loader: the same data whatever the number of workers, processes and restarts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gram_engine.config.schema import Config, DataConfig, TrainingConfig
from gram_engine.data.dataset import PairDataset
from gram_engine.data.inspect import InspectArguments, describe
from gram_engine.data.loader import PackedLoader
from gram_engine.data.packing import best_fit_decreasing, pack_for_ranks, sample_costs
from gram_engine.data.preprocess import ensure_preprocessed, preprocess
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.errors import ConfigError, DataError
from tests.conftest import TEMPLATE, write_pairs

ENDINGS = (".bin", ".idx", ".samples.npy", ".json")


def make(data, prefix, tokenizer, objective="pair-preference", both_orders=False, workers=1, **settings):
    cfg = DataConfig(tokenizer_model=tokenizer, seq_length=192, template=TEMPLATE, **settings)
    return preprocess([data], prefix, objective=objective, cfg=cfg, both_orders=both_orders, workers=workers)


def ready(tiny_data, data, objective="pair-preference", both_orders=False) -> str:
    """Prefix in the cache."""
    config = Config(data=data, training=TrainingConfig(objective=objective))
    tokenizer = Tokenizer.load("auto", data.tokenizer_model)
    return ensure_preprocessed([tiny_data["jsonl"]], config, both_orders, tokenizer).prefix


def loader(prefix, batch=8, rank=0, size=1, tokens=400, **settings):
    return PackedLoader(
        PairDataset(prefix), global_batch_size=batch, pack_tokens=tokens, pad_multiple=4,
        dp_rank=rank, dp_size=size, seed=3, **settings,
    )  # fmt: skip


def test_result_does_not_depend_on_the_number_of_workers(tiny_data, tmp_path):
    write_pairs(tmp_path / "many.jsonl", rows=300)
    for workers in (1, 2):
        make(tmp_path / "many.jsonl", tmp_path / str(workers), tiny_data["tokenizer"], workers=workers)
    for ending in ENDINGS:
        assert (tmp_path / f"1{ending}").read_bytes() == (tmp_path / f"2{ending}").read_bytes(), ending


def test_a_row_that_stops_a_worker_is_named(tiny_data, tmp_path):
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b"}] * 150 + [{"prompt": "x", "chosen": "a " * 300, "rejected": "b"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="long.jsonl:151: [0-9]+ tokens, over --seq-length 192"):
        make(tmp_path / "long.jsonl", tmp_path / "out", tiny_data["tokenizer"], overlong="error", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["long.jsonl"], "nothing half-made stays behind"
    manifest = make(tmp_path / "long.jsonl", tmp_path / "out", tiny_data["tokenizer"], overlong="drop")
    assert manifest.counts == {"rows": 151, "samples": 150, "truncated": 0, "dropped": 1, "rejected": 0}


def test_raw_files_are_preprocessed_once_for_the_same_settings(tiny_data, tmp_path):
    data = DataConfig(tokenizer_model=tiny_data["tokenizer"], seq_length=192, template=TEMPLATE, data_cache_path=str(tmp_path))
    first = ready(tiny_data, data)
    written = Path(f"{first}.bin").stat().st_mtime_ns
    assert ready(tiny_data, data) == first
    assert Path(f"{first}.bin").stat().st_mtime_ns == written
    others = [
        ready(tiny_data, data, "pair-preference", True),
        ready(tiny_data, data, "response-lm", False),
        ready(tiny_data, replace(data, seq_length=150), "pair-preference", False),
    ]
    assert len({first, *others}) == 4
    Path(f"{first}.idx").unlink()
    assert len(PairDataset(ready(tiny_data, data))) == 48


def test_ready_made_rows_keep_their_order_unless_both_are_wanted(tiny_data, tmp_path):
    template = JudgeTemplate.load(TEMPLATE)
    rows = [{"instruction": template.judge("x", "a", str(i)), "input": "", "output": "AB"[i % 2]} for i in range(4)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    make(tmp_path / "r.json", tmp_path / "once", tiny_data["tokenizer"])
    once = PairDataset(tmp_path / "once").samples
    assert once["order"].tolist() == [0] * 4 and once["preference"].tolist() == [1, 0, 1, 0]
    make(tmp_path / "r.json", tmp_path / "twice", tiny_data["tokenizer"], both_orders=True)
    twice = PairDataset(tmp_path / "twice").samples
    assert twice["order"].tolist() == [0, 1] * 4 and twice["preference"].tolist() == [1, 0, 0, 1] * 2


@pytest.mark.parametrize("seed", range(4))
def test_packs_are_whole_within_capacity_and_balanced(seed):
    lengths = np.random.default_rng(seed).integers(1, 400, size=200)
    packs = best_fit_decreasing(lengths, 1000)
    assert sorted(i for pack in packs for i in pack) == list(range(200))
    assert all(lengths[pack].sum() <= 1000 for pack in packs) and len(packs) <= -(-lengths.sum() // 1000) + 1
    ranks = pack_for_ranks(lengths, 1000, num_ranks=4, multiple=2, attention_cost=1e-3)
    assert {len(rank) for rank in ranks} == {-(-len(packs) // 8) * 2}
    assert sorted(i for rank in ranks for pack in rank for i in pack) == list(range(200))
    assert all(lengths[pack].sum() <= 1000 for rank in ranks for pack in rank)
    costs = [sum(sample_costs(lengths[pack], 1e-3).sum() for pack in rank) for rank in ranks]
    assert max(costs) <= 1.03 * min(costs)


def test_packs_that_leave_no_room_for_balance_are_kept():
    lengths = np.array([6, 6, 4, 4])  # balanced by cost alone, 6 + 4 twice; a capacity of 10 leaves nothing else
    assert [sorted(lengths[pack].tolist()) for rank in pack_for_ranks(lengths, 10, 2, 1, 0.0) for pack in rank] == [[4, 6]] * 2
    lengths = np.array([5, 4, 4, 3, 3, 3, 2])  # the greedy balance finds no room in two packs of 12: best fit does
    ranks = pack_for_ranks(lengths, 12, 2, 1, 0.0)
    assert sorted(lengths[pack].sum() for rank in ranks for pack in rank) == [12, 12]
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit into a pack of 10"):
        pack_for_ranks(np.array([11]), 10, 1, 1, 0.0)


def test_data_that_does_not_suit_the_loader_is_refused(tiny_data, tmp_path):
    with pytest.raises(ConfigError, match=r"has a sample of \d+ tokens, but a micro-batch holds 50"):
        loader(tiny_data["stage2"], tokens=50)
    row = {"instruction": "[User Question]\nx", "output": "an answer without markers"}
    (tmp_path / "v.jsonl").write_text(json.dumps(row) + "\n")
    make(tmp_path / "v.jsonl", tmp_path / "v", tiny_data["tokenizer"], objective="response-lm")
    assert loader(tmp_path / "v", batch=1).batch(0).num_rows > 1
    with pytest.raises(ConfigError, match="does not show where its two responses are"):
        loader(tmp_path / "v", response_loss="b")


def test_orders_are_balanced_and_labels_follow_the_order(tiny_data, tmp_path):
    random, both = PairDataset(tiny_data["stage2"]), tmp_path / "both"
    assert random.samples["order"].mean() == 0.5
    assert np.array_equal(random.samples["preference"], 1.0 - random.samples["order"])
    make(tiny_data["jsonl"], both, tiny_data["tokenizer"], both_orders=True)
    samples = PairDataset(both).samples
    assert len(samples) == 2 * len(random) and samples["preference"].mean() == 0.5
    assert all(set(samples["order"][samples["pair"] == pair]) == {0, 1} for pair in np.unique(samples["pair"]))


def test_ties_half_or_dropped(tiny_data, tmp_path):
    rows = [{"prompt": "x", "response_a": "a", "response_b": "b", "label": label} for label in ("A", "tie", "B")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(tmp_path / "t.jsonl", tmp_path / "half", tiny_data["tokenizer"])
    assert 0.5 in PairDataset(tmp_path / "half").samples["preference"]
    manifest = make(tmp_path / "t.jsonl", tmp_path / "drop", tiny_data["tokenizer"], ties="drop")
    assert len(PairDataset(tmp_path / "drop")) == 2 and manifest.counts["dropped"] == 1


def test_every_sample_once_an_epoch_in_another_order_each(tiny_data):
    data = loader(tiny_data["stage2"])
    epochs = [
        [i for step in range(6) for pack in data.batch(epoch * 48 + 8 * step).microbatches for i in pack.sample_ids.tolist()]
        for epoch in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(48)) and epochs[0] != epochs[1]


@pytest.mark.parametrize("size", [2, 3])
def test_samples_of_a_step_do_not_depend_on_the_number_of_processes(size, tiny_data):
    for consumed in (0, 8, 44):
        alone = loader(tiny_data["stage2"]).batch(consumed)
        shared = [loader(tiny_data["stage2"], rank=rank, size=size).batch(consumed) for rank in range(size)]
        ids = lambda *batches: sorted(  # noqa: E731
            i for batch in batches for pack in batch.microbatches for i in pack.sample_ids.tolist()
        )
        assert ids(*shared) == ids(alone) and len({len(batch.microbatches) for batch in shared}) == 1
        assert {(b.num_samples, b.num_tokens, b.num_rows) for b in shared} == {(8, alone.num_tokens, 8)}


def test_packs_hold_whole_samples_with_their_label_rows(tiny_data):
    data, dataset = loader(tiny_data["stage2"]), PairDataset(tiny_data["stage2"])
    for pack in data.batch(0).microbatches:
        bounds = pack.cu_seqlens.tolist()
        assert len(pack.tokens) % 4 == 0 and len(pack.tokens) <= 400 and bounds[-1] == len(pack.tokens)
        for place, sample in enumerate(pack.sample_ids.tolist()):
            part = slice(bounds[place], bounds[place + 1])
            assert np.array_equal(pack.tokens[part].numpy(), dataset.tokens(sample))
            assert pack.position_ids[part].tolist() == list(range(bounds[place + 1] - bounds[place]))
            assert bounds[place + 1] - 1 in pack.rows


def test_stage_1_rows_predict_the_target_and_variants_divide_it(tiny_data):
    dataset = PairDataset(tiny_data["stage1"])
    counted = {}
    for name, settings in {
        "both": {}, "a": {"response_loss": "a"}, "b": {"response_loss": "b"}, "text": {"marker_loss": False},
    }.items():  # fmt: skip
        batch = loader(tiny_data["stage1"], **settings).batch(0)
        counted[name] = batch.num_rows
        for pack in batch.microbatches:
            assert (pack.targets == pack.tokens[pack.rows + 1]).all()
            ends = pack.cu_seqlens[1:] - 1
            assert not set(pack.rows.tolist()) & set(ends.tolist()), "the last token of a sample predicts nothing"
    assert counted["a"] + counted["b"] == counted["both"] and counted["text"] < counted["both"]
    ids = [i for pack in loader(tiny_data["stage1"]).batch(0).microbatches for i in pack.sample_ids]
    expected = sum(int(dataset.lengths[i]) - int(dataset.samples["target_start"][i]) for i in ids)
    assert counted["both"] == expected


def test_weights_have_mean_one_over_the_global_batch(tiny_data, tmp_path):
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b", "weight": weight} for weight in (1, 3, 0, 4)]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(tmp_path / "w.jsonl", tmp_path / "w", tiny_data["tokenizer"])
    batch = loader(tmp_path / "w", batch=4).batch(0)
    weights = np.concatenate([pack.weight.numpy() for pack in batch.microbatches])
    assert weights.mean() == pytest.approx(1) and sorted(weights) == pytest.approx([0, 0.5, 1.5, 2])


def test_number_of_microbatches_is_filled_up_with_empty_packs(tiny_data):
    batch = loader(tiny_data["stage2"], batch=2, microbatch_multiple=4).batch(0)
    empty = [pack for pack in batch.microbatches if not len(pack.rows)]
    assert len(batch.microbatches) % 4 == 0 and empty and all(len(pack.tokens) == 4 for pack in empty)


def test_evaluation_shows_every_sample_in_order_once(tiny_data):
    batches = list(loader(tiny_data["stage2"], batch=20).evaluation_batches())
    ids = sorted(i for batch in batches for pack in batch.microbatches for i in pack.sample_ids.tolist())
    assert ids == list(range(48)) and [batch.num_samples for batch in batches] == [20, 20, 8]


def test_damaged_data_is_refused(tiny_data, tmp_path):
    make(tiny_data["jsonl"], tmp_path / "d", tiny_data["tokenizer"])
    (tmp_path / "d.bin").write_bytes((tmp_path / "d.bin").read_bytes()[:-10])
    with pytest.raises(DataError, match="d"):
        PairDataset(tmp_path / "d")
    with pytest.raises(DataError, match="nothing.json: no such file"):
        PairDataset(tmp_path / "nothing")


def test_inspect_shows_the_label_row_and_the_tokens_with_loss(tiny_data):
    stage_2 = "\n".join(describe(InspectArguments(tiny_data["stage2"], sample=5)))
    assert "label row" in stage_2 and "#Preferred:" in stage_2 and "sample 5 |" in stage_2
    stage_1 = "\n".join(describe(InspectArguments(tiny_data["stage1"], sample=5, only_sample=True)))
    before_loss, _, loss = stage_1.partition("\n  loss")
    assert "[User Question]" in before_loss and "[The End of Assistant B's Answer]" in loss
