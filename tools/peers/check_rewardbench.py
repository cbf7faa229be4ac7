"""rewardbench: its command on a file of conversations, which renders, tokenises and scores by its own code, on a CPU."""

import json
import os
import sys

from peer import PAIRS, Check, messages, texts_of_pairs
from rewardbench.rewardbench import main
from transformers import BatchEncoding

BatchEncoding.to = lambda self, device: self  # its pipeline names "cuda"


def rewards(folder):
    data, output = folder.parents[1] / "rewardbench.jsonl", folder.parents[1] / "rewardbench"
    os.chdir(folder.parent)  # it makes names of files of the model's name
    rows = [{"chosen": messages(prompt, a), "rejected": messages(prompt, b)} for prompt, a, b in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--load_json --not_quantized --torch_dtype float32 --batch_size 4 --save_all"
    sys.argv = ["rewardbench", f"--model={folder.name}", f"--dataset={data}", f"--output_dir={output}/", *flags.split()]
    main()
    lines = map(json.loads, (output / f"{folder.name}_all.jsonl").read_text().splitlines())
    return texts_of_pairs(), [line[name][0] for line in lines for name in ("chosen", "rejected")]


check = Check("rewardbench")
check.run("scalar", "`rewardbench --load_json --not_quantized`, padded batches", rewards)
check.save("rewardbench")
