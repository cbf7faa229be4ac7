"""rewardbench: its command on a file of conversations, which renders, tokenises and scores by its own code."""

import json
import os

from peer import PAIRS, Check, messages, texts_of_pairs
from rewardbench.rewardbench import Args, actual_main


def rewards(folder):
    data, output = folder.parents[1] / "rewardbench.jsonl", folder.parents[1] / "rewardbench"
    os.chdir(folder.parent)  # it makes names of files of the model's name
    rows = [{"chosen": messages(prompt, a), "rejected": messages(prompt, b)} for prompt, a, b in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    actual_main(
        Args(
            model=folder.name,
            dataset=str(data),
            load_json=True,
            not_quantized=True,
            torch_dtype="float32",
            batch_size=4,
            save_all=True,
            output_dir=f"{output}/",
        )
    )
    lines = map(json.loads, (output / f"{folder.name}_all.jsonl").read_text().splitlines())
    return texts_of_pairs(), [line[name] for line in lines for name in ("chosen", "rejected")]


check = Check("rewardbench")
check.run("scalar", "`rewardbench --load_json`, padded batches", rewards)
check.save("rewardbench")
