"""Damaged configurations, templates, tokenizers and reports: a clear error that names the file. GRAM_FAULTS=long tries more."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from gram_engine.config.parse import load_yaml, parse
from gram_engine.convert.metadata_files import read_evaluation
from gram_engine.data.samples import generate_sample, judge_sample, label_ids
from gram_engine.data.template import JudgeTemplate
from gram_engine.data.tokenizer import Tokenizer
from gram_engine.scoring.resumable import ResumableLines
from tests.conftest import TEMPLATE
from tests.support.data_faults import Fault, changed, flipped, refused
from tests.support.mutations import VALUES, damaged_bytes

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


def config_file(work, draw) -> str:
    """A configuration that training scripts come with, damaged, or with a value that is none."""
    source = draw.choice([file for file in sorted(CONFIGS.glob("*.yaml")) if "template" not in file.name])
    path = work.file("run.yaml")
    content = source.read_bytes()
    if draw.random() < 0.5:
        name, value = draw.choice(("seed", "load", "data", "model", "lr", "no_such")), draw.choice(VALUES + YAML)
        content += f"\n{name}: {value}\n".encode()
    else:
        content = damaged_bytes(draw, content)
    path.write_bytes(content)
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            return refused(lambda: use_config(path), str(path))
        except SystemExit as end:
            assert end.code == 2 and str(path) in said.getvalue() and "Traceback" not in said.getvalue()
            return "refused"


def use_config(path: Path) -> None:
    """What a checkpoint keeps of it reads as the same again."""
    config = parse(["--config", str(path)])
    again = path.with_suffix(".again.yaml")
    again.write_text(config.to_yaml(), encoding="utf-8")
    one, other = (found.to_yaml().replace(".0\n", "\n") for found in (load_yaml(again), config))  # 30 is read as 30.0
    assert one == other


YAML = (
    "!!python/object/apply:os.system ['exit 1']", "!!binary x", "&a [*a, *a]", "{? [1]: 2}", "2001-99-99", "0b2", "- 1", "\t",
       "[" * 2000, "'unclosed", "*no", "--load", "[--load, x]", "{a: {b: 1}}", "2001-01-01", "1:30", "~",
)  # fmt: skip


def template_file(work, draw) -> str:
    """A judge template, damaged, or with a value that is none."""
    path = work.file("template.yaml")
    content = Path(TEMPLATE).read_bytes()
    if draw.random() < 0.5:
        lines = content.decode().splitlines()
        number = draw.choice([n for n, line in enumerate(lines) if re.match(r"[a-z_]+: ", line)])
        lines[number] = f"{lines[number].partition(':')[0]}: {draw.choice(VALUES + YAML)}"
        content = "\n".join(lines).encode()
    else:
        content = damaged_bytes(draw, content)
    path.write_bytes(content)
    return refused(lambda: use_template(path), str(path))


def use_template(path: Path) -> None:
    template = JudgeTemplate.load(path)
    prompt, a, b = "the prompt", "one answer", "another answer"
    text = template.judge(prompt, a, b)
    assert text.count(prompt) == text.count(a) == text.count(b) == 1 and template.label_a != template.label_b
    again = JudgeTemplate.from_dict(template.to_dict(), "again")
    assert (again.judge(prompt, a, b), again.sha256) == (text, template.sha256)


def tokenizer_file(work, draw) -> str:
    """A tokenizer's file, damaged, then used as preprocessing does."""
    if draw.random() < 0.4:
        path = content_of = Path(work.tokenizer)
    else:
        path = work.hf_tokenizer
        content_of = path / draw.choice(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    change = draw.choice((damaged_bytes, flipped, jinja) if content_of.suffix == ".jinja" else (damaged_bytes, flipped))
    with changed(content_of, change(draw, content_of.read_bytes())):
        return refused(lambda: use_tokenizer(path, work.template), str(path))


def jinja(draw, content: bytes) -> bytes:
    """A chat template that fails, or asks for what its sandbox does not give."""
    pieces = ("{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for %}", "{{ x.__class__.__mro__ }}", "{{ range(10**9) }}")
    return draw.choice(pieces).encode() + content


def use_tokenizer(path: Path, template: JudgeTemplate) -> None:
    tokenizer = Tokenizer.load("auto", path)
    label_a, label_b = label_ids(tokenizer, template)
    long = "yes " * 90
    judge = judge_sample(tokenizer, template.judge_layout("say \u00fc \x00 yes", long, "no"), 160, "truncate")
    target = template.responses_layout(long, "no")
    generate = generate_sample(tokenizer, template.generate_layout("say yes").followed_by(target), 160, "truncate")
    assert label_a != label_b
    for sample in (judge, generate):
        assert 0 < len(sample.tokens) <= 160
        assert all(0 <= token < tokenizer.vocab_size for token in (*sample.tokens, label_a, label_b))


def report_file(work, draw) -> str:
    """A report of scores for the model card, damaged."""
    path = work.file("report.json")
    path.write_bytes(damaged_bytes(draw, b'{"figures": {"accuracy": 0.75, "pairs": 12}, "all": {"pairs": 3}, "files": ["x"]}'))
    figures: dict = {}
    outcome = refused(lambda: figures.update(read_evaluation(str(path))), str(path))
    assert all(isinstance(name, str) and f"{value:.4g}" for name, value in figures.items())
    return outcome


def partial_lines(work, draw) -> str:
    """Lines that a killed job left, damaged: those before the damage stay, the job goes on behind them."""
    path, rows = work.file("scores.jsonl"), [{"place": n, "text": "\u00fc" * n} for n in range(12)]
    partial_file = work.file("scores.jsonl.partial")
    ResumableLines(path).begin({"of": "this"})
    content = "".join(json.dumps([n, row], ensure_ascii=False) + "\n" for n, row in enumerate(rows)).encode()
    place = draw.randrange(len(content))
    partial_file.write_bytes(content[:place] + draw.choice((b"\x00", b"\xff", b"}", b"\n", b"[" * 5000)) + content[place + 1 :])
    whole = content[:place].count(b"\n")
    assert ResumableLines(path).begin({"of": "this"})[:whole] == list(range(whole))
    kept = [json.loads(line) for line in partial_file.read_text(encoding="utf-8").splitlines()]
    assert kept[:whole] == [[n, row] for n, row in enumerate(rows[:whole])]
    return "gone on before the damage"


FAULTS = [
    Fault("damaged configuration YAML", "bytes changed; nested, recursive or python values; aliases", config_file, 30, 1000,
          ("refused", "opened"), 0.5),
    Fault("damaged judge template", "the same", template_file, 100, 3000, ("refused", "opened"), 0.5),
    Fault("damaged tokenizer", "SentencePiece model, tokenizer.json, tokenizer_config.json, chat template", tokenizer_file,
          60, 2000, ("refused", "opened"), 0.6),
    Fault("damaged report for the model card", "bytes changed", report_file, 300, 10_000,
          ("refused", "opened"), 0.8),
    Fault("damaged lines of a killed `score`", "a byte changed", partial_lines, 100, 5000, ("gone on before the damage",)),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault, fault_work):
    fault.run(fault_work)
