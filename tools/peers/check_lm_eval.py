"""lm-eval: log-likelihoods of the two labels after a judge prompt; their difference is the margin."""

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peer import PAIRS, Check, judge_prompts


def margins(folder):
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    asked = [(text, label) for text in judge_prompts(folder, model.tokenizer) for label in "AB"]
    requests = [Instance("loglikelihood", {}, arguments, number) for number, arguments in enumerate(asked)]
    found = [likelihood for likelihood, _ in model.loglikelihood(requests)]
    return PAIRS, [a - b for a, b in zip(found[::2], found[1::2])]


check = Check("lm_eval")
check.run("causal-lm", "`loglikelihood` of both labels", margins)
check.save("lm_eval")
