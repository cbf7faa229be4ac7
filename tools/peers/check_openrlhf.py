"""OpenRLHF: the loader and the encoding of its reward server, without GPU."""

import importlib.machinery
import sys
import types

import torch
from peer import PAIRS, Check, judge_prompts, messages, texts_of_pairs


class Absent(types.ModuleType):
    """A module that is imported, but not used on a CPU."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed", "deepspeed"):
    sys.modules[name] = Absent(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)

import openrlhf.utils.utils  # noqa: E402
from openrlhf.cli.serve_rm import RewardModelProxy  # noqa: E402

openrlhf.utils.utils.convert_to_torch_dtype = lambda name: torch.float32  # it offers bfloat16 and float16 only


def server(folder):
    """What the options of `serve_rm` become."""
    ds = dict(attn_implementation="eager", experts_implementation=None, param_dtype="bf16", load_in_4bit=False)
    ds |= dict(value_head_prefix="score", packing_samples=False)
    return RewardModelProxy(
        types.SimpleNamespace(
            reward=types.SimpleNamespace(model_name_or_path=str(folder), normalize_enable=False),
            ds=types.SimpleNamespace(**ds),
            data=types.SimpleNamespace(disable_fast_tokenizer=False, max_len=2048),
            batch_size=4,
        )
    )


def rewards(folder):
    proxy = server(folder)
    queries = [proxy.tokenizer.apply_chat_template(messages(*text), tokenize=False) for text in texts_of_pairs()]
    return texts_of_pairs(), proxy.get_reward(queries)


def margins(folder):
    proxy = server(folder)
    queries = judge_prompts(folder, proxy.tokenizer)
    if proxy.tokenizer.chat_template is None:  # the server adds no special tokens
        queries = [proxy.tokenizer.bos_token + query for query in queries]
    return PAIRS, proxy.get_reward(queries)


torch.set_grad_enabled(False)
check = Check("openrlhf")
check.run("scalar", "`serve_rm`'s loader and encoding", rewards)
check.run("pair-logit", "`serve_rm`'s loader and encoding, judge prompts", margins)
check.save("openrlhf")
