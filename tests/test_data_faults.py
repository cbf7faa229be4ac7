"""Bad data and damaged files: each fault injected many times. GRAM_FAULTS=long tries more.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gram_engine.config.parse import parse
from gram_engine.config.schema import Config, DataConfig
from gram_engine.data.dataset import PairDataset
from gram_engine.data.integrity import SEAL, sealed
from gram_engine.data.preprocess import ensure_preprocessed, preprocess
from gram_engine.data.readers import read_rows
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.evaluation.suites import SUITES, read_eval_pairs
from tests.conftest import TEMPLATE, train_tokenizer
from tests.support.data_faults import Fault, changed, flipped, refused, resealed
from tests.support.mutations import PARQUET, ROWS, TEXT, VALUES, bad_line, damaged_bytes

ENDINGS = (".bin", ".idx", ".samples.npy", ".json")
REMEDY = "reprocess"  # "Preprocess the data again", "or preprocess again"


# --- preprocessed data -------------------------------------------------------------------------------------------------


def one_file(work, draw, change) -> str:
    """Change one file of one data set by change(draw, bytes), and open it as a run's main process does."""
    prefix = work.file(draw.choice(("pair-preference", "response-lm")))
    path = Path(f"{prefix}{draw.choice(ENDINGS)}")
    content = change(draw, path.read_bytes())
    with changed(path, content):
        return refused(lambda: PairDataset(prefix, whole=True), path.name, REMEDY)


def cut_off(draw, content):
    return content[: draw.randrange(len(content))]


def longer(draw, content):
    return content + draw.randbytes(draw.randint(1, 100))


def swapped(work, draw) -> str:
    """A file of data of the same rows shown in another order; a file that is the same in both is no fault."""
    ending = draw.choice(ENDINGS)
    path, other = work.file(f"pair-preference{ending}"), work.file(f"twin{ending}").read_bytes()
    if other == path.read_bytes():
        return "the same file"
    with changed(path, other):
        return refused(lambda: PairDataset(work.file("pair-preference"), whole=True), "pair-preference.", REMEDY)


def index_values(work, draw) -> str:
    """One number of the index is another, and the checksums agree: what somebody who means harm would write."""
    prefix = work.file("pair-preference")
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    sequences = int.from_bytes(data[18:26], "little")
    fields = {9: 8, 17: 1, 18: 8, 26: 8, 34 + 4 * draw.randrange(sequences): 4}
    fields |= {34 + 4 * sequences + 8 * draw.randrange(2 * sequences + 1): 8}
    place, size = draw.choice(list(fields.items()))
    value = draw.choice((0, 1, 7, 1 << 31, (1 << 63) - 1, (1 << 64) - 2, draw.getrandbits(64))) % (1 << 8 * size)
    if data[place : place + size] == value.to_bytes(size, "little"):
        return "the same value"
    data[place : place + size] = value.to_bytes(size, "little")
    with resealed(prefix, path, bytes(data)):
        return refused(lambda: PairDataset(prefix, whole=True), path.name, REMEDY)


def row_values(work, draw) -> str:
    """A row of .samples.npy holds a position, order, preference or weight that cannot be, and the checksums agree."""
    prefix = work.file("response-lm")
    path = Path(f"{prefix}.samples.npy")
    rows = np.load(path)
    name = draw.choice(("order", "preference", "weight", "target_start", "a_start", "a_end", "middle", "b_start", "b_end"))
    impossible = {"order": (2, -1), "preference": (1.5, -0.1), "weight": (-1, float("nan"))}
    rows[name][draw.randrange(len(rows))] = draw.choice(impossible.get(name, (-5, 193, 1 << 30)))
    content = io.BytesIO()
    np.save(content, rows)
    with resealed(prefix, path, content.getvalue()):
        return refused(lambda: PairDataset(prefix), path.name, REMEDY)


def without_checksums(work, draw) -> str:
    path = work.file("pair-preference.json")
    manifest = {**json.loads(path.read_text()), "format_version": 1}
    del manifest["files"], manifest[SEAL]
    with changed(path, json.dumps(manifest).encode()):
        return refused(lambda: PairDataset(path.with_suffix("")), "format version 1", "Preprocess the data again")


def cached(work, draw) -> str:
    """Files that --data was preprocessed to are damaged between two runs: the second makes them again."""
    data = DataConfig(
        tokenizer_model=work.tokenizer, seq_length=192, template=TEMPLATE, data_cache_path=str(work.file("cache"))
    )
    prefix = ensure_preprocessed([work.jsonl], Config(data=data), False, Tokenizer.load("auto", work.tokenizer)).prefix
    path = Path(f"{prefix}{draw.choice(ENDINGS)}")
    before = path.read_bytes()
    path.write_bytes(damaged_bytes(draw, before))
    assert ensure_preprocessed([work.jsonl], Config(data=data), False, Tokenizer.load("auto", work.tokenizer)).prefix == prefix
    assert path.read_bytes() == before
    return "made again"


def other_run(work, _, fault: str) -> str:
    """A run whose tokenizer, template, objective, length or label ids are not what the data was made with."""
    from gram_engine.training.initialise import _prepare_on_main

    flags = ["--model", "tiny", "--data-path", str(work.file("pair-preference")), "--tokenizer-model", work.tokenizer]
    if fault == "tokenizer":
        tokenizer = train_tokenizer(work.jsonl, work.file("other.model"), vocab_size=480)
        flags, said = [*flags[:-1], tokenizer, "--seq-length", "192"], "made with another tokenizer than"
    elif fault == "template":
        flags, said = [*flags, "--seq-length", "192", "--template", "gram-code"], "not with --template gram-code"
    elif fault == "objective":
        flags, said = [*flags, "--seq-length", "192", "--objective", "response-lm"], "made for --objective pair-preference"
    elif fault == "short":
        flags, said = [*flags, "--seq-length", "64"], "more than --seq-length 64"
    elif fault == "long":
        work.make("shortened", "pair-preference", write_long(work.file("long.jsonl")))
        flags[3], said = str(work.file("shortened")), "1 samples were shortened to --seq-length 192, this run has 2048"
    elif fault == "valid":
        template = work.file("valid.yaml")
        template.write_text(Path(TEMPLATE).read_text().replace("Preferred", "Better"))
        cfg = DataConfig(tokenizer_model=work.tokenizer, seq_length=192, template=str(template))
        preprocess([work.jsonl], work.file("valid"), objective="pair-preference", cfg=cfg, both_orders=True)
        flags, said = [*flags, "--valid-data-path", str(work.file("valid"))], "not with the training data's template"
    else:
        path = work.file("pair-preference.json")
        manifest = json.loads(path.read_text())
        del manifest[SEAL]
        with changed(path, json.dumps(sealed({**manifest, "label_ids": [5, 6]})).encode()):
            return refused(lambda: _prepare_on_main(parse(flags)), "made for the label tokens [5, 6]", REMEDY)
    return refused(lambda: _prepare_on_main(parse(flags)), said, REMEDY)


OTHER_RUNS = {
    "tokenizer": "another tokenizer",
    "template": "another template",
    "valid": "validation data of another template",
    "objective": "another objective",
    "short": "`--seq-length` under the longest sample",
    "long": "`--seq-length` over the one samples were shortened to",
    "labels": "other label ids",
}


def write_long(path: Path) -> Path:
    path.write_text(json.dumps({"prompt": "x", "chosen": "red stone " * 200, "rejected": "no"}) + "\n")
    return path


# --- files of rows -----------------------------------------------------------------------------------------------------

GOOD = [json.dumps({"prompt": f"good row {n} end", "chosen": "yes", "rejected": "no"}).encode() for n in range(4)]


def good_numbers(rows) -> list[int]:
    return [int(number) for row in rows for number in re.findall(r"^good row (\d+) end$", getattr(row, "prompt", ""))]


def jsonl_line(work, draw) -> str:
    """A damaged line among good ones: read with and without a place for bad rows."""
    path = work.file("bad.jsonl")
    damaged = bad_line(draw)
    path.write_bytes(b"\n".join([*GOOD[:2], damaged, *GOOD[2:]]) + b"\n")
    rejects = []
    rows = list(read_rows([path], DataConfig(), lambda error, _: rejects.append(str(error))))
    assert good_numbers(rows) == [0, 1, 2, 3], "a good row is lost"
    lines = [int(re.match(rf"{re.escape(str(path))}:(\d+): .", message)[1]) for message in rejects]
    assert lines == sorted(set(lines)) and set(lines) <= set(range(3, 4 + damaged.count(b"\n")))
    assert all(message.isprintable() and len(message) < 1000 for message in rejects)
    strict = refused(lambda: list(read_rows([path], DataConfig())), *rejects[:1])
    assert (strict == "refused") == bool(rejects)
    return "refused with file:line" if rejects else "still a row"


def whole_file(work, draw) -> str:
    """Many damaged lines among good ones through `gram preprocess --skip-bad-rows`, then what is in .bin, and the rejects."""
    path, count = work.file("mixed.jsonl"), 1000
    lines = []
    for number in range(count):
        lines.append(bad_line(draw).replace(b"\n", b" "))
        if number % 10 == 9:
            lines.append(GOOD[0].replace(b"row 0", b"row %d" % (number // 10)))
    path.write_bytes(b"\n".join(lines))
    objective = draw.choice(("pair-preference", "response-lm"))
    manifest = work.make("mixed", objective, path, skip_bad_rows=True)
    dataset, tokenizer = PairDataset(work.file("mixed"), whole=True), Tokenizer.load("auto", work.tokenizer)
    texts = [tokenizer.decode(dataset.tokens(number).tolist()) for number in range(len(dataset))]
    assert [int(n) for text in texts for n in re.findall(r"good row (\d+) end", text)] == list(range(count // 10))
    rejects = [json.loads(line) for line in work.file("mixed.rejects.jsonl").read_text().splitlines()]
    numbers = [int(re.match(rf"{re.escape(str(path))}:(\d+): .", reject["error"])[1]) for reject in rejects]
    assert numbers == sorted(set(numbers)) and len(numbers) == manifest.counts["rejected"]
    assert not {number for number in numbers if lines[number - 1].startswith(b'{"prompt": "good row')}
    return f"all {count // 10} good rows in .bin"


GZIP = gzip.compress(TEXT, mtime=0)
ARRAY = b"[" + TEXT.replace(b"\n", b",\n") + b"]\n"


def container(work, draw, name: str, content: bytes) -> str:
    """A damaged file that is no list of lines: refused, naming it, or read with all its rows as they were."""
    path = work.file(name)
    path.write_bytes(damaged_bytes(draw, content))
    rows = []
    outcome = refused(lambda: rows.extend(read_rows([path], DataConfig())), f"{path}:")
    if outcome == "opened" and name.endswith((".gz", ".parquet")):
        assert [row.prompt for row in rows] == [row["prompt"] for row in ROWS]
        return "all rows whole"
    if outcome == "opened":  # nothing guards the letters of a text, but each that is left is one
        assert 0 < len(rows) <= len(ROWS)
        assert all(row.prompt.strip() and row.response_a.strip() and row.response_b.strip() for row in rows)
    return outcome


def no_file(work, draw) -> str:
    """Empty files, folders, missing and unreadable ones, with every ending."""
    ending = draw.choice((".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".pq", ".gz", ""))
    path = work.folder / f"nothing{draw.randrange(1 << 30)}{ending}"
    kind = draw.choice(("empty", "blank", "folder", "missing", "long name"))
    if kind == "folder":
        path.mkdir()
    elif kind == "long name":
        path = work.folder / ("x" * 5000 + ending)
    elif kind != "missing":
        content = b"" if kind == "empty" else b"\n \r\n\n"
        path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    return refused(lambda: list(read_rows([path], DataConfig())), str(path))


def suite_line(work, draw) -> str:
    """Rows of benchmarks with damaged values, read as each suite."""
    row = draw.choice(SUITE_ROWS)
    name, key = draw.choice((*SUITES, "auto")), draw.choice([*row, "id", "subset"])
    path = work.file("suite.jsonl")
    text = json.dumps({**row, key: "@@"}).replace('"@@"', draw.choice(VALUES))
    path.write_bytes(text.encode() if draw.random() < 0.8 else damaged_bytes(draw, text.encode()))
    found: list = []
    outcome = refused(lambda: found.extend(read_eval_pairs([str(path)], name)[1]), f"{path}")
    assert (outcome == "opened") == bool(found)
    for pair in found:
        assert pair.prompt.strip() and pair.a.strip() and pair.b.strip() and 0 <= pair.preference <= 1, pair
        assert isinstance(pair.subset, str) and pair.num_correct >= 1, pair
    return outcome


SUITE_ROWS = (
    {"prompt": "x", "chosen": "a", "rejected": "b", "subset": "math-prm", "id": 3},
    {"prompt": "x", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "subset": "Ties", "id": "ref:1"},
    {"prompt": "x", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"},
    {"question": "x", "response_A": "a", "response_B": "b", "label": "A>B", "source": "mmlu-pro"},
    {"input": "x", "targets": {"choices": ["a", "b"], "labels": [1, 0]}, "subset": "honest"},
)

FAULTS = [
    Fault("a file of preprocessed data is missing", "`.bin`, `.idx`, `.samples.npy` or `.json` taken away",
          partial(one_file, change=lambda draw, content: None), 8, 40),
    Fault("... is cut off", "at a random byte", partial(one_file, change=cut_off), 40, 1000),
    Fault("... is longer", "random bytes behind its end", partial(one_file, change=longer), 20, 500),
    Fault("... is altered", "one random bit turned over", partial(one_file, change=flipped), 200, 10_000),
    Fault("... belongs to other data", "the same rows preprocessed with another seed", swapped, 12, 100,
          ("refused", "the same file"), 0.7),
    Fault("`.idx` points elsewhere, checksums agree", "one header field, length, offset or document number",
          index_values, 100, 3000, ("refused", "the same value"), 0.9),
    Fault("`.samples.npy` has impossible values, checksums agree", "one position, order, preference or weight",
          row_values, 60, 2000),
    Fault("manifest from before checksums", "format version 1", without_checksums, 1, 1),
    Fault("cached data of `--data` is damaged", "random damage to one of its files between two runs", cached,
          8, 100, ("made again",)),
    *(Fault("the run does not fit the data", how, partial(other_run, fault=fault), 1, 1) for fault, how in OTHER_RUNS.items()),
    Fault("bad line in JSONL", "wrong types, nesting, huge numbers, half surrogates, NUL, BOM, other encodings, cut "
          "lines, names given twice, garbage ...", jsonl_line, 3_000, 100_000,
          ("refused with file:line", "still a row"), 0.8),
    Fault("1,000 bad lines among 100 good rows, `--skip-bad-rows`", "as above, through `gram preprocess`", whole_file, 2, 20,
          ("all 100 good rows in .bin",)),
    Fault("damaged `.jsonl.gz`", "bytes changed, moved, cut off", partial(container, name="a.jsonl.gz", content=GZIP),
          500, 20_000, ("refused", "all rows whole"), 0.95),
    Fault("damaged JSON array", "the same", partial(container, name="a.json", content=ARRAY), 500, 20_000,
          ("refused", "opened"), 0.8),
    Fault("damaged Parquet with page checksums", "the same", partial(container, name="a.parquet", content=PARQUET),
          500, 20_000, ("refused", "all rows whole"), 0.8),
    Fault("no file of rows", "empty, blank, a folder, missing, a name too long", no_file, 100, 1000),
    Fault("damaged rows of benchmarks", "values and bytes changed, read as each suite", suite_line,
          1000, 50_000, ("refused", "opened"), 0.8),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, fault_work):
    fault.run(fault_work)
