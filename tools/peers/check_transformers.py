"""transformers 4: both pipelines as users call them, and the logits of a language model."""

import json

import torch
from peer import PAIRS, Check, judge_prompts, messages, texts_of_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def label_logits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    label_a, label_b = json.loads((folder / "gram_config.json").read_text())["label_ids"]
    margins = []
    for text in judge_prompts(folder, tokenizer):
        inputs = tokenizer(text, add_special_tokens=tokenizer.chat_template is None, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        margins.append(logits[label_a] - logits[label_b])
    return PAIRS, margins


def classifier(folder):
    return pipeline("text-classification", model=str(folder), torch_dtype=torch.float32, batch_size=4)


def margins(folder):
    pipe = classifier(folder)
    results = pipe(judge_prompts(folder, pipe.tokenizer), padding=True, function_to_apply="none")
    return PAIRS, [result["score"] for result in results]


def rewards(folder):
    pipe = classifier(folder)
    texts = [pipe.tokenizer.apply_chat_template(messages(*text), tokenize=False) for text in texts_of_pairs()]
    return texts_of_pairs(), [result["score"] for result in pipe(texts, padding=True)]


check = Check("transformers")
check.run("causal-lm", "label logits of `AutoModelForCausalLM`", label_logits)
check.run("pair-logit", '`pipeline`, padded batches, `function_to_apply="none"`', margins)
check.run("scalar", "`pipeline`, padded batches, its own default activation", rewards)
check.save("transformers")
