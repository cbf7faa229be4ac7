"""Trees of tokens hold every text, share what is alike, and judge as the texts alone would be."""

import random

import numpy as np
import pytest
import torch

from gram_engine.scoring.judge_model import JudgeModel
from gram_engine.scoring.token_tree import LEAST_SHARED, TokenTree
from tests.support.hf_models import KINDS, write_hf_model


def text_of(tree, leaf):
    return [token for segment in tree.path(leaf) for token in tree.tokens[segment]]


def check(texts, *, groups=1):
    tree = TokenTree()
    for number in range(groups):
        tree.add(texts[number::groups])
    wanted = [text for number in range(groups) for text in texts[number::groups]]
    assert [text_of(tree, leaf) for leaf in tree.leaves] == wanted
    assert len(set(tree.leaves)) == len(texts), "every text has an end of its own"
    for segment, parent in enumerate(tree.parents):
        assert parent < segment and tree.tokens[segment]
        assert tree.starts[segment] == (tree.starts[parent] + len(tree.tokens[parent]) if parent >= 0 else 0)
    return tree


def test_pairs_and_lists_share_their_beginnings():
    prompt, reference = list(range(100)), list(range(200, 250))
    responses = [[300 + number] * 20 for number in range(5)]
    pair = check([prompt + responses[0] + responses[1], prompt + responses[1] + responses[0]])
    assert pair.size == 100 + 2 * 40
    judged = [prompt + reference + response for response in responses]
    judged += [prompt + response + reference for response in responses]
    assert check(judged).size == 100 + 50 + 5 * 20 + 5 * 70


@pytest.mark.parametrize("seed", range(20))
def test_any_texts(seed):
    generator = random.Random(seed)
    texts = []
    for _ in range(generator.randint(1, 12)):
        start = generator.choice(texts)[: generator.randint(1, 60)] if texts and generator.random() < 0.7 else []
        texts.append(start + [generator.randint(0, 2) for _ in range(generator.randint(0, 40))] or [7])
    texts += texts[: generator.randint(0, 2)]
    tree = check(texts, groups=generator.randint(1, 3))
    assert tree.size <= sum(map(len, texts))
    shared = [len(tree.tokens[segment]) for segment in set(tree.parents) if segment >= 0]
    assert all(size >= LEAST_SHARED for size in shared)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_margins_equal_transformers(kind, tied, tmp_path):
    """One text, a deep tree, and texts beside each other; float32."""
    torch.set_num_threads(1)
    model = write_hf_model(tmp_path, 97, tied, kind)
    generator = torch.Generator().manual_seed(3)
    sizes = (90, 40, 30, 25, 61)
    prompt, reference, *responses = (torch.randint(0, 97, (size,), generator=generator).tolist() for size in sizes)
    texts = [prompt + reference + response for response in responses]
    texts += [prompt + response + reference for response in responses]
    texts += [prompt, [5], responses[0]]
    with torch.no_grad():
        logits = [model(torch.tensor([text])).logits[0, -1] for text in texts]
    wanted = np.array([float(row[11] - row[12]) for row in logits])
    judge = JudgeModel(tmp_path, (11, 12))
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(judge.margins(TokenTree.of(texts)).numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(judge.margins(TokenTree.of(texts[-1:])).numpy(), wanted[-1:], atol=1e-5)
    alone = TokenTree()
    for text in texts:
        alone.add([text])
    assert all(parent < 0 for parent in alone.parents)
    np.testing.assert_allclose(judge.margins(alone).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama3-8", "qwen3"])
def test_bfloat16_errs_no_more_than_transformers_does(kind, tmp_path):
    model = write_hf_model(tmp_path, 97, False, kind, torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(0, 97, (120,), generator=generator).tolist() for _ in range(12)]
    wanted = JudgeModel(tmp_path, (11, 12), "float32").margins(TokenTree.of(texts))
    with torch.no_grad():
        logits = model(torch.tensor(texts)).logits[:, -1].float()
    theirs = (logits[:, 11] - logits[:, 12] - wanted).norm()
    ours = (JudgeModel(tmp_path, (11, 12)).margins(TokenTree.of(texts)) - wanted).norm()
    assert 0 < ours <= 1.5 * theirs
